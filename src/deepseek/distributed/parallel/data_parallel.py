"""Data parallelism: gradients summed over the ranks that have the same weights, and ZeRO, which does not keep copies.

    zero_stage 0   every rank has everything; gradients are summed in buckets while the backward pass goes on
    zero_stage 1   optimizer states and weights are sharded between steps; gradients are reduced once a step
    zero_stage 2   as 1, and gradients are reduced and sharded after every micro-batch
    zero_stage 3   weights are sharded within a step as well, and gathered block by block

Stages 1 to 3 are torch's FSDP2. Gradients are sums over ranks everywhere and never averages: the loss is divided by the
units of all ranks before (`parallel_model.py`), so that ranks may have different numbers of units. With a
`DeepSeekComm`, its algorithms carry all of it: rings and two levels over the hosts that the ranks are on.
Sources: Rajbhandari et al. 2020 (ZeRO); Li et al. 2020 (buckets).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from deepseek.distributed.communicator import DeepSeekComm
from deepseek.distributed.parallel.shard_messages import GatherShards, ScatterGradients

BUCKET_BYTES = 25 * 1024**2
"""Gradients that are reduced in one message; that of torch's DDP."""


def as_local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read_loss(loss: Tensor) -> float:
    """Return a loss as a number, also where it is a DTensor."""
    plain = loss.detach()
    return float(plain.full_tensor() if isinstance(plain, DTensor) else plain)


class _Underway(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Return when it is done."""


class GradientReducer:
    """Sums gradients over a group, a bucket at a time, while the backward pass computes others.

    A bucket is sent when its gradients and all buckets before it are there, so that all ranks send in one order. A
    gradient that only some ranks have counts as zero on the others; one that no rank has stays `None`: how many ranks
    have it travels with the bucket. With `comm`, which is over the same group, buckets travel by the algorithm that
    is fastest there for their size.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        comm: DeepSeekComm | None = None,
    ) -> None:
        self._group = group
        self._comm = comm
        self._buckets = fill_buckets(parameters, bucket_bytes)
        self._is_last = False
        self._waiting: list[set[nn.Parameter]] = []
        self._sent: list[tuple[_Underway, Tensor]] = []
        for parameter in (parameter for bucket in self._buckets for parameter in bucket):
            parameter.register_post_accumulate_grad_hook(self._note)

    def begin(self) -> None:
        """Expect the last backward pass of the step, after which gradients are summed."""
        self._is_last = True
        self._waiting = [set(bucket) for bucket in self._buckets]
        self._sent = []

    def finish(self) -> None:
        """Send what is left, wait, and leave the sums in the gradients."""
        for waiting in self._waiting:
            waiting.clear()
        self._send_ready()
        for bucket, (work, flat) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            _spread_out(bucket, flat)
        self._is_last = False

    def _note(self, parameter: nn.Parameter) -> None:
        if self._is_last:
            for waiting in self._waiting:
                waiting.discard(parameter)
            self._send_ready()

    def _send_ready(self) -> None:
        while len(self._sent) < len(self._buckets) and not self._waiting[len(self._sent)]:
            flat = _flatten(self._buckets[len(self._sent)])
            self._sent.append((self._sum(flat), flat))

    def _sum(self, flat: Tensor) -> _Underway:
        if self._comm is not None:
            return cast("_Underway", self._comm.all_reduce(flat, async_op=True))
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        return cast("_Underway", work)


def fill_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Group parameters by dtype into buckets, the last ones first, since their gradients come first.

    >>> weights = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    >>> [len(bucket) for bucket in fill_buckets(weights, bucket_bytes=32)]
    [2, 1]
    """
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed([parameter for parameter in parameters if parameter.requires_grad]):
        num_bytes = as_local(parameter).nbytes
        if not buckets or num_bytes > room or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= num_bytes
    return buckets


def _flatten(bucket: Sequence[nn.Parameter]) -> Tensor:
    """Return the gradients of a bucket one after the other, and behind them a 1 for each, or a 0 if there is none."""
    gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in bucket]
    pieces = [as_local(gradient).reshape(-1) for gradient in gradients]
    return torch.cat([*pieces, pieces[0].new_tensor([parameter.grad is not None for parameter in bucket])])


def _spread_out(bucket: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Write sums into the gradients; one that only other ranks have is made, one that no rank has is not."""
    sizes = [as_local(parameter).numel() for parameter in bucket]
    *pieces, holders = flat.split([*sizes, len(bucket)])
    for parameter, piece, num_holders in zip(bucket, pieces, holders.tolist(), strict=True):
        if num_holders and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradient = as_local(parameter.grad)
            gradient.copy_(piece.view_as(gradient))


def shard_(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    zero_stage: int,
    ignored: set[nn.Parameter],
    comm: DeepSeekComm | None = None,
) -> None:
    """Shard the weights of `module` over `mesh`, block by block and without those `ignored`, in place."""
    is_gathered_twice = zero_stage == 3
    for block in (*blocks, module):
        fully_shard(block, mesh=mesh, reshard_after_forward=is_gathered_twice, ignored_params=ignored)
        sharded = cast("FSDPModule", block)
        sum_gradients_(sharded)
        if comm is not None:
            sharded.set_custom_all_gather(cast("Any", GatherShards(comm)))
            sharded.set_custom_reduce_scatter(cast("Any", ScatterGradients(comm)))


def sum_gradients_(sharded: FSDPModule) -> None:
    """Reduce gradients by sums: averages of gloo were wrong in older versions of torch, and ranks differ in units."""
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
