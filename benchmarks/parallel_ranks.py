"""What one rank of `benchmarks.parallel` does: `python -m benchmarks.parallel_ranks JOB`, the job as JSON.

Every side trains the same decoder, from the same weights, on the same rows with the same optimizer. Sides take turns,
another one first in each round; a round's time is that of the slowest rank.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage as TorchStage
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rank_processes import answer
from deepseek.checkpoint.activations import checkpoint_blocks_
from deepseek.core.allocator import give_back_freed_memory
from deepseek.core.process_memory import forget_peak, peak_bytes
from deepseek.data.batching import Batch
from deepseek.distributed import DeepSeekComm
from deepseek.distributed.parallel import build_mesh
from deepseek.distributed.parallel.layer_costs import split_layers
from deepseek.distributed.plan import Plan
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.decoder.plan import keep_stage, list_rows
from deepseek.models.parallelizing import parallelize
from deepseek.models.transformers_models.model import TransformersModel, build_transformers
from deepseek.train.config import TrainConfig
from deepseek.train.tasks.causal_lm import CausalLM

LEARNING_RATE = 1e-3
OURS = "deepseek"
NUM_COMPARED = 3  # losses from the first on: differences in rounding grow from step to step
Step = Callable[[Tensor, Tensor], float]
"""All rows of a step (B, T) and their targets -> this rank's share of the mean loss; the shares add up to it."""


class Workload:
    """What all sides of a job train, and how."""

    def __init__(self, job: dict[str, Any], comm: DeepSeekComm | None) -> None:
        self.config = DecoderConfig(**job["model"])
        self.num_rows: int = job["rows"]
        self.micro_batches: int = job["micro_batches"]
        self.comm = comm
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def build_model(self) -> Decoder:
        """Return the decoder with its first weights."""
        torch.manual_seed(0)
        return Decoder(self.config).train()

    def take_own(self, rows_BT: Tensor) -> Tensor:
        """Return this rank's share of the rows."""
        return rows_BT.chunk(self.world_size)[self.rank].contiguous()

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a step, the same on all ranks, and their targets."""
        generator = torch.Generator().manual_seed(step)
        shape = (self.num_rows, self.config.max_length + 1)
        tokens_BT = torch.randint(self.config.vocab_size, shape, generator=generator)
        return tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()


def main() -> None:
    """Join, run the job, and write what was measured."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with DeepSeekComm.init("gloo", init_method=job["meeting"], timeout_s=240) as comm:
        result = measure_memory(job) if job["kind"] == "memory" else time_families(job, comm)
        if comm.get_rank() == 0:
            answer(result)
        comm.barrier()


def time_families(job: dict[str, Any], comm: DeepSeekComm) -> dict[str, Any]:
    """Return seconds of a step by family and side, and the first losses; a side that is not here says why."""
    workload = Workload(job, comm if job["has_comm"] else None)
    return {family: time_sides(family, workload, job) for family in job["families"]}


def time_sides(family: str, workload: Workload, job: dict[str, Any]) -> dict[str, Any]:
    """Let the sides of a family take turns."""
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}
    for name, build in FAMILIES[family].items():
        try:
            steps[name] = build(workload)
        except ImportError as error:
            absent[name] = f"not installed ({error.name}); see benchmarks/peers.txt"
    losses = {name: [_sum_over_ranks(step(*workload.draw(index))) for index in range(NUM_COMPARED)]
              for name, step in steps.items()}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(job["rounds"]):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            seconds[name].append(_time_steps(steps[name], workload, job["steps"]))
    return {"seconds": seconds, "losses": losses, "absent": absent}


def _time_steps(step: Step, workload: Workload, num_steps: int) -> float:
    """Return seconds of one step on the slowest rank."""
    batches = [workload.draw(index) for index in range(num_steps)]
    dist.barrier()
    began_s = time.perf_counter()
    for rows_BT, targets_BT in batches:
        step(rows_BT, targets_BT)
    slowest = torch.tensor([(time.perf_counter() - began_s) / num_steps], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _sum_over_ranks(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


# ---- our side


def build_ours(workload: Workload, **settings: Any) -> Step:
    """Return a step of this framework under a plan for all ranks."""
    plan = Plan(precision="fp32", **settings)
    mesh = build_mesh(plan)
    parallel = parallelize(workload.build_model(), plan, mesh, comm=workload.comm)
    optimizer = torch.optim.AdamW(parallel.parameter_groups(), lr=LEARNING_RATE)
    task = CausalLM(TrainConfig())
    num_parts = plan.dp * (workload.micro_batches if plan.pp > 1 else 1)

    def step(rows_BT: Tensor, targets_BT: Tensor) -> float:
        pieces = zip(rows_BT.chunk(num_parts), targets_BT.chunk(num_parts), strict=True)
        batches = [Batch(rows, targets, targets.numel()) for rows, targets in pieces]
        optimizer.zero_grad()
        totals = parallel.accumulate_gradients(task, batches[mesh.coordinate("dp") :: plan.dp])
        optimizer.step()
        return totals.loss / workload.world_size

    return step


def _ours(**settings: Any) -> Callable[[Workload], Step]:
    """Return the builder of our side; a size of "all" is the number of ranks."""

    def build(workload: Workload) -> Step:
        sizes = {name: workload.world_size if value == "all" else value for name, value in settings.items()}
        return build_ours(workload, **sizes)

    return build


# ---- plain loops, and what calls them


def loop(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    is_cut: bool,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Step:
    """Return the step that one writes by hand; each rank has its share of the rows, or all where the model `is_cut`."""

    def step(rows_BT: Tensor, targets_BT: Tensor) -> float:
        if not is_cut:
            rows_BT, targets_BT = workload.take_own(rows_BT), workload.take_own(targets_BT)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows_BT).flatten(0, 1), targets_BT.flatten())
        backward(loss)
        optimizer.step()
        return float(loss.detach()) / workload.world_size

    return step


def build_ddp(workload: Workload) -> Step:
    """Return a step of torch's DDP."""
    model = DistributedDataParallel(workload.build_model())
    return loop(workload, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), is_cut=False)


def build_accelerate(workload: Workload) -> Step:
    """Return a step of Accelerate, which wraps DDP."""
    from accelerate import Accelerator

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # asked for, and not used: the ranks have met
    accelerator = Accelerator(cpu=True)
    model = workload.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    return loop(workload, model, optimizer, is_cut=False, backward=accelerator.backward)


def build_fabric(workload: Workload, strategy: Any, *, is_cut: bool) -> Step:
    """Return a step of Lightning Fabric under one of its strategies."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    fabric = Fabric(accelerator="cpu", devices=workload.world_size, strategy=strategy, plugins=[LightningEnvironment()])
    fabric.launch()
    model = fabric.setup_module(workload.build_model())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
    return loop(workload, model, optimizer, is_cut=is_cut, backward=fabric.backward)


def build_fabric_ddp(workload: Workload) -> Step:
    """Return a step of Fabric's DDP."""
    return build_fabric(workload, "ddp", is_cut=False)


def build_fabric_shards(workload: Workload) -> Step:
    """Return a step of Fabric with FSDP2, written as its documentation has it: every block, then the model."""
    from lightning_fabric.strategies import ModelParallelStrategy

    def shard(model: Decoder, mesh: DeviceMesh) -> Decoder:
        return shard_blocks(model, mesh["data_parallel"])

    return build_fabric(
        workload,
        ModelParallelStrategy(shard, data_parallel_size=workload.world_size, tensor_parallel_size=1),
        is_cut=False,
    )


def build_fabric_tensors(workload: Workload) -> Step:
    """Return a step of Fabric with tensor parallelism, by torch's tutorial on it."""
    from lightning_fabric.strategies import ModelParallelStrategy

    def cut(model: Decoder, mesh: DeviceMesh) -> Decoder:
        return cut_blocks(model, mesh["tensor_parallel"])

    return build_fabric(
        workload,
        ModelParallelStrategy(cut, data_parallel_size=1, tensor_parallel_size=workload.world_size),
        is_cut=True,
    )


def build_torch_shards(workload: Workload) -> Step:
    """Return a step of torch's FSDP2 without anything around it."""
    model = shard_blocks(workload.build_model(), init_device_mesh("cpu", (workload.world_size,)))
    return loop(workload, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), is_cut=False)


def build_torch_tensors(workload: Workload) -> Step:
    """Return a step of torch's tensor parallelism without anything around it."""
    model = cut_blocks(workload.build_model(), init_device_mesh("cpu", (workload.world_size,)))
    return loop(workload, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), is_cut=True)


def shard_blocks(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Shard as FSDP2's tutorial does."""
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def cut_blocks(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Cut as torch's tutorial on tensor parallelism does, with whole activations between the layers."""
    for block in model.layers:
        columns = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "feedforward.gate_proj")
        plan: dict[str, Any] = {name: ColwiseParallel() for name in (*columns, "feedforward.up_proj")}
        plan |= {name: RowwiseParallel() for name in ("attention.o_proj", "feedforward.down_proj")}
        parallelize_module(block, mesh, plan)
        attention: Any = block.attention
        for name in ("num_heads", "num_kv_heads", "num_local_heads"):
            setattr(attention, name, getattr(attention, name) // mesh.size())
    ends = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(model, mesh, ends)  # type: ignore[return-value]


class StageOfDecoder(nn.Module):
    """What one stage holds of a decoder, called with tokens or with the values that came in."""

    def __init__(self, model: Decoder, index: int, num_stages: int) -> None:
        super().__init__()
        stage = split_layers(list_rows(model).list_costs(), num_stages)[index]
        self.received = keep_stage(model, stage)
        self.model = model

    def forward(self, value: Tensor) -> Tensor:
        """Return the values for the next stage, or logits."""
        if self.received is not None:
            self.received.value = value
            value = torch.zeros(value.shape[:2], dtype=torch.int64)  # only their number is read
        outputs: Tensor = self.model(value)
        return outputs


def build_torch_pipeline(workload: Workload) -> Step:
    """Return a step of torch's 1F1B, with the layers on the stages where we have them."""
    rank, num_stages = workload.rank, workload.world_size
    module = StageOfDecoder(workload.build_model(), rank, num_stages)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
    is_last = rank == num_stages - 1

    def measure_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    schedule = Schedule1F1B(
        TorchStage(module, rank, num_stages, torch.device("cpu")), workload.micro_batches, loss_fn=measure_loss
    )

    def step(rows_BT: Tensor, targets_BT: Tensor) -> float:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(rows_BT)
        elif is_last:
            schedule.step(target=targets_BT, losses=losses)
        else:
            schedule.step()
        optimizer.step()
        return float(torch.stack(losses).mean().detach()) if is_last else 0.0

    return step


FAMILIES: dict[str, dict[str, Callable[[Workload], Step]]] = {
    "data parallel": {
        OURS: _ours(dp="all"),
        "torch DDP": build_ddp,
        "Accelerate DDP": build_accelerate,
        "Fabric DDP": build_fabric_ddp,
    },
    "ZeRO 3": {
        OURS: _ours(dp="all", zero_stage=3),
        "torch FSDP2": build_torch_shards,
        "Fabric FSDP2": build_fabric_shards,
    },
    "tensor parallel": {
        OURS: _ours(tp="all"),
        "torch DTensor": build_torch_tensors,
        "Fabric DTensor": build_fabric_tensors,
    },
    "pipeline": {OURS: _ours(pp="all"), "torch 1F1B": build_torch_pipeline},
}


# ---- memory


class MaskedTokens:
    """The loss of BERT at every place of its rows."""

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, T, V) logits."""
        logits_BTV: Tensor = model(batch[0])
        return logits_BTV

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum of the cross-entropy."""
        return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction="sum")

    def count_units(self, batch: tuple[Tensor, Tensor]) -> int:
        """Count the tokens."""
        return batch[1].numel()


def measure_memory(job: dict[str, Any]) -> dict[str, Any]:
    """Return the most resident bytes of the fullest rank in training steps, over those before there was a model."""
    give_back_freed_memory()
    forget_peak()
    before = peak_bytes()
    model = build_bert(job["model"], job["length"])
    if job["is_checkpointed"]:
        checkpoint_blocks_(model)
    parallel = parallelize(model, Plan(precision="fp32", dp=dist.get_world_size(), zero_stage=job["zero_stage"]))
    optimizer = torch.optim.AdamW(parallel.parameter_groups(), lr=LEARNING_RATE)
    give_back_freed_memory()
    forget_peak()
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(2):  # the second has the optimizer's moments from its beginning
        tokens_BT = torch.randint(job["model"]["vocab_size"], (1, job["length"]), generator=generator)
        optimizer.zero_grad()
        losses.append(parallel.accumulate_gradients(MaskedTokens(), [(tokens_BT, tokens_BT)]).loss)
        optimizer.step()
    gained = torch.tensor([peak_bytes() - before], dtype=torch.int64)
    dist.all_reduce(gained, dist.ReduceOp.MAX)
    return {"bytes": int(gained), "losses": losses}


def build_bert(sizes: dict[str, int], length: int) -> TransformersModel:
    """Return a BERT for masked tokens of those sizes, with room for rows of that length."""
    values = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "max_position_embeddings": length,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **sizes,
    }
    torch.manual_seed(0)
    return build_transformers(values).train()


if __name__ == "__main__":
    main()
