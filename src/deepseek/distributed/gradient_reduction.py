"""Gradients averaged by `DeepSeekComm`'s algorithms under torch's own data parallelism: DDP's and HSDP's hooks.

    ddp_model.register_comm_hook(None, average_gradients(comm))            buckets, while the backward pass goes on
    fsdp_module.set_all_reduce_hook(average_shards(comm.group("dp")))      HSDP: shards inside, replicas across

DDP hands over one bucket after the other as they fill. Each is submitted to the communicator's thread, which runs them
in order; DDP waits for all of them at the end. `comm_overlap` says how much of that was waiting. (DDP compares the
annotations of a hook with classes, so they are no strings in this file.)
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from deepseek.distributed.communicator import DeepSeekComm
from deepseek.distributed.overlap import is_overlapping

DDPHook = Callable[[object, GradBucket], torch.futures.Future[torch.Tensor]]


def average_gradients(comm: DeepSeekComm, *, algorithm: str = "auto", payload: torch.dtype | None = None) -> DDPHook:
    """Return a communication hook for DDP that averages each bucket over the ranks of `comm`.

    With `algorithm="auto"` the first step measures; buckets of one size are measured once.
    """

    def reduce_bucket(_state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        devices: list[int | str | torch.device] = [buffer.device] if buffer.is_cuda else []
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        if is_overlapping():
            pending = comm.all_reduce(buffer, dist.ReduceOp.AVG, algorithm=algorithm, payload=payload, async_op=True)
            pending.pass_on(future, is_waited_for=bucket.is_last())
        else:
            future.set_result(comm.all_reduce(buffer, dist.ReduceOp.AVG, algorithm=algorithm, payload=payload))
        return future

    return reduce_bucket


def average_shards(
    comm: DeepSeekComm, *, algorithm: str = "auto", payload: torch.dtype | None = None
) -> Callable[[torch.Tensor], None]:
    """Return a hook for `FSDPModule.set_all_reduce_hook` that averages gradient shards over the replicas of `comm`.

    Shard the module over the ranks of one replica only (`fully_shard(module, mesh=mesh["shard"])`); the reduce-scatter
    stays inside it, and what is left crosses the slow links here, once for each shard.
    """

    def reduce_shard(shard: torch.Tensor) -> None:
        comm.all_reduce(shard, dist.ReduceOp.AVG, algorithm=algorithm, payload=payload)

    return reduce_shard
