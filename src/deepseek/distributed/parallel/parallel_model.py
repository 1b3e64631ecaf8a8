"""A model under a plan: cut from outside by `cut`, and the gradients of a step over all its ranks.

    broadcast -> stages (pp) -> experts (ep) -> sequences (cp) -> rows (tp) -> ZeRO or buckets (dp and cp)

The order matters: a stage first loses what others hold, so that no rank cuts or sends what it does not keep; FSDP comes
last, since it looks at DTensors and not the other way round. What a step needs of a task is a `Learner`, which every
`deepseek.train.Task` is:

    parallel = cut(model, rows, plan, build_mesh(plan))
    optimizer = torch.optim.AdamW(parallel.parameter_groups())
    totals = parallel.accumulate_gradients(task, micro_batches)
    parallel.clip_gradients_(1.0)
    optimizer.step()

The loss is the mean over all units of all ranks and micro-batches: each summed loss is divided by the units of all of
them, and gradients are sums over ranks. Precision is no matter of this file: autocast stands in the learner's forward.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from deepseek.core.errors import ConfigError, TrainingError
from deepseek.distributed.communicator import DeepSeekComm
from deepseek.distributed.parallel.cut_tensors import cut_whole, gather_whole, measure_norm, scale_, sum_over
from deepseek.distributed.parallel.data_parallel import GradientReducer, as_local, read_loss, shard_
from deepseek.distributed.parallel.experts import balance_over_ranks_, spread_experts_
from deepseek.distributed.parallel.layer_costs import split_layers
from deepseek.distributed.parallel.legality import ModelParts, check_plan_runs
from deepseek.distributed.parallel.mesh import PlanMesh
from deepseek.distributed.parallel.pipeline import Learner, Pipeline, PipelineStage, Received, StageModule
from deepseek.distributed.parallel.sequence_ring import SequenceRing, cut_batches
from deepseek.distributed.parallel.tensor_parallel import Rows, TensorParallel, apply_rows, find_tied, match_modules
from deepseek.distributed.parallel.weight_gradients import split_backward_
from deepseek.distributed.plan import Plan


@dataclass(frozen=True)
class ModelRows:
    """Where parallelism takes hold of a model; `models/<name>/plan.py` has one for each of ours."""

    parts: ModelParts
    """What may be cut."""
    tensor: Rows = ()
    """Rows of tensor parallelism."""
    blocks: str = ""
    """Pattern of the blocks that are sharded one by one; without it the model is sharded as a whole."""
    routers: str = ""
    """Pattern of the layers with experts."""
    keep_stage: Callable[[nn.Module, PipelineStage], Received | None] | None = None
    """Takes out of a model, in place, what the stage does not hold; returns where its input comes in."""
    cut_sequences: Callable[[nn.Module, SequenceRing], None] | None = None
    """Lets a model, in place, take the part of a sequence that lies on a rank, and see the rest by the ring."""
    embed_cost: float = 0.0
    """What the first stage computes besides its layers, in layers."""
    head_cost: float = 0.0
    """What the last stage computes besides its layers, in layers."""
    layer_costs: tuple[float, ...] = ()
    """Measured costs of the layers, embedding and head included; without them, layers are taken for equal."""

    def list_costs(self) -> list[float]:
        """List what each layer costs, embedding and head included.

        >>> ModelRows(ModelParts("Mine", num_layers=3), head_cost=2.0).list_costs()
        [1.0, 1.0, 3.0]
        """
        num_layers = self.parts.num_layers
        if self.layer_costs and len(self.layer_costs) != num_layers:
            raise ConfigError(
                f"{len(self.layer_costs)} layer costs were given for layers={num_layers}; give one for each layer"
            )
        if any(not (math.isfinite(cost) and cost > 0) for cost in self.layer_costs):
            raise ConfigError(f"the layer costs are {list(self.layer_costs)}; give positive numbers")
        costs = list(self.layer_costs) or [1.0] * num_layers
        if not self.layer_costs:
            costs[0] += self.embed_cost
            costs[-1] += self.head_cost
        return costs


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks and micro-batches of a step."""

    loss: float
    """Mean per unit."""
    num_units: int


class ParallelModel:
    """The part of a model that this rank holds under a plan."""

    def __init__(
        self,
        plan: Plan,
        mesh: PlanMesh,
        chunks: Sequence[StageModule],
        *,
        tied: Sequence[tuple[str, str]],
        partial_names: frozenset[str],
        expert_names: frozenset[str],
        comm: DeepSeekComm | None = None,
    ) -> None:
        self.plan = plan
        self.mesh = mesh
        self._comm = comm
        self.chunks = list(chunks)
        self._first_name = {other: first for first, other in tied}
        self._partial_names = partial_names
        self._expert_names = expert_names
        self._reducers = [self._build_reducers(chunk) for chunk in self.chunks]
        device = as_local(next(self.module.parameters())).device
        self._pipeline = Pipeline(plan, self.chunks, mesh.group("pp"), device) if plan.pp > 1 else None
        self._shared_with = self._find_twin_rank()

    @property
    def module(self) -> nn.Module:
        """The model, or this rank's first stage of it."""
        return self.chunks[0].module

    @property
    def modules(self) -> list[nn.Module]:
        """The model, or all stages of it that this rank holds."""
        return [chunk.module for chunk in self.chunks]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that this rank holds a piece of, by their names in the whole model."""
        for chunk in self.chunks:
            for name, parameter in chunk.module.named_parameters():
                yield self._first_name.get(name, name), parameter

    def parameter_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """Return the trainable parameters, grouped so that an optimizer may update each group in one call."""
        groups: dict[object, list[nn.Parameter]] = {}
        for _, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(_find_kind(parameter), []).append(parameter)
        return [{"params": group} for group in groups.values()]

    def is_expert(self, name: str) -> bool:
        """Return whether the ranks of a parameter hold different experts of it."""
        return name in self._expert_names

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """Return the whole of a parameter's tensor (its value, gradient or moment); all ranks of its stage call it."""
        return gather_whole(tensor, self.mesh, is_expert=self.is_expert(name))

    def cut(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        """Return this rank's piece of a whole tensor of a parameter, cut as `like` is; what `gather` undoes."""
        return cut_whole(whole, like, self.mesh, is_expert=self.is_expert(name))

    def count_units(self, learner: Learner, micro_batches: Sequence[Any]) -> int:
        """Count the units of a step over all ranks, of batches that are cut already where sequences are."""
        count = torch.tensor(sum(learner.count_units(batch) for batch in micro_batches), dtype=torch.int64)
        count = count.to(self.mesh.base.device_type)
        dist.all_reduce(count, group=self.mesh.group(self.mesh.data_axis))
        return int(count)

    def accumulate_gradients(self, learner: Learner, micro_batches: Sequence[Any]) -> StepTotals:
        """Set the gradients of the mean loss over all units of all ranks, which this rank has `micro_batches` of.

        Every rank gives as many micro-batches; ranks that differ in `dp` give different ones, all others the same,
        which are cut here where sequences are (`cp`). Raises `TrainingError` where no rank has anything to learn from,
        and `ConfigError` for a learner whose sequences cannot be cut.
        """
        if self.plan.cp > 1:
            micro_batches = cut_batches(learner, micro_batches, build_ring(self.mesh))
        num_units = self.count_units(learner, micro_batches)
        if num_units == 0:
            raise TrainingError(
                "a step has nothing to learn from on any rank; check the data for rows that are all padding"
            )
        if self._pipeline is not None:
            loss = self._pipeline.run(
                learner,
                micro_batches,
                num_units,
                loss_context=self._loss_context,
                before_backward=self._before_backward,
            )
        else:
            loss = self._run(learner, micro_batches, num_units)
        self._finish_gradients()
        return StepTotals(self._sum_loss(loss), num_units)

    def gradient_norm(self) -> float:
        """Return the norm of the whole gradient, the same on every rank."""
        return measure_norm(self._list_own_gradients(), self.mesh)

    def clip_gradients_(self, max_norm: float | None) -> float:
        """Scale the gradient in place so that its norm is at most `max_norm`; return the norm before that."""
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient norm is {norm}; expected a finite number: lower the learning rate, check the batches "
                "for extreme values, or use precision 'fp32'"
            )
        if max_norm is not None and norm > max_norm:
            self.scale_gradients_(max_norm / norm)
        return norm

    def scale_gradients_(self, factor: float) -> None:
        """Multiply the gradient by `factor`, in place."""
        gradients = (parameter.grad for _, parameter in self.named_parameters())
        scale_((gradient for gradient in gradients if gradient is not None), factor)

    def measure_experts(self) -> dict[str, dict[str, float]]:
        """Return how unevenly each layer of this rank used its experts in the last training pass, over all tokens."""
        return {
            name: cast("Any", module).measure_balance()
            for chunk in self.chunks
            for name, module in chunk.module.named_modules()
            if hasattr(module, "measure_balance")
        }

    def _list_own_gradients(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield gradients with whether they are an expert's; what another stage holds as well counts there."""
        for chunk in self.chunks:
            for name, parameter in chunk.module.named_parameters():
                is_twin = self.plan.pp > 1 and name in self._first_name
                if parameter.grad is not None and not is_twin:
                    yield parameter.grad, self.is_expert(name)

    def _run(self, learner: Learner, micro_batches: Sequence[Any], num_units: int) -> float:
        total = 0.0
        for index, batch in enumerate(micro_batches):
            outputs = learner.forward(self.module, batch)
            with self._loss_context():
                loss = learner.loss(outputs, batch) / num_units
                self._before_backward(self.chunks[0], index == len(micro_batches) - 1)
                loss.backward()
            total += read_loss(loss)
        return total

    def _loss_context(self) -> AbstractContextManager[None]:
        """Let cross-entropy read logits that are cut over the vocabulary."""
        return cast("AbstractContextManager[None]", loss_parallel()) if self.plan.tp > 1 else nullcontext()

    def _before_backward(self, chunk: StageModule, is_last: bool) -> None:
        if is_last:
            for reducer in self._reducers[self.chunks.index(chunk)]:
                reducer.begin()
        if isinstance(chunk.module, FSDPModule):
            chunk.module.set_is_last_backward(is_last)
            chunk.module.set_requires_gradient_sync(is_last or self.plan.zero_stage > 1)
            chunk.module.set_reshard_after_backward(is_last or self.plan.zero_stage == 3)

    def _finish_gradients(self) -> None:
        for _, parameter in self.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and gradient.placements != cast("DTensor", parameter).placements:
                parameter.grad = gradient.redistribute(placements=cast("DTensor", parameter).placements)
        for reducers in self._reducers:
            for reducer in reducers:
                reducer.finish()
        partial = [
            parameter.grad
            for name, parameter in self.named_parameters()
            if name in self._partial_names and parameter.grad is not None
        ]
        if partial:
            sum_over(partial, self.mesh.group("tp"))
        self._sum_twins()

    def _sum_loss(self, loss: float) -> float:
        total = torch.tensor(loss, dtype=torch.float64).to(self.mesh.base.device_type)
        dist.all_reduce(total, group=self.mesh.group(self.mesh.data_axis))
        if self.plan.pp > 1:
            dist.all_reduce(total, group=self.mesh.group("pp"))
        return float(total)

    def _build_reducers(self, chunk: StageModule) -> list[GradientReducer]:
        named = dict(chunk.module.named_parameters())
        experts = [parameter for name, parameter in named.items() if name in self._expert_names]
        others = [parameter for name, parameter in named.items() if name not in self._expert_names]
        reducers = []
        num_copies = self.plan.dp * self.plan.cp
        if num_copies > 1 and self.plan.zero_stage == 0:
            reducers.append(self._build_reducer(others, self.mesh.data_axis))
        if experts and num_copies > self.plan.ep:
            reducers.append(self._build_reducer(experts, "expert_copies"))
        return reducers

    def _build_reducer(self, parameters: Sequence[nn.Parameter], axis: str) -> GradientReducer:
        group = self.mesh.group(axis)
        return GradientReducer(parameters, group, comm=self._comm and self._comm.over(group, axis))

    def _find_twin_rank(self) -> int | None:
        """Return the stage that holds a tied parameter of this one as well, if any."""
        if self.plan.pp == 1 or not self._first_name:
            return None
        twins = {0: self.plan.pp - 1, self.plan.pp - 1: 0}
        return twins.get(self.mesh.coordinate("pp"))

    def _sum_twins(self) -> None:
        """Sum the gradients of parameters that the first and the last stage share, so that both stay alike."""
        if self._shared_with is None:
            return
        held = {name for chunk in self.chunks for name, _ in chunk.module.named_parameters(remove_duplicate=False)}
        shared = {first for other, first in self._first_name.items() if (first in held) != (other in held)}
        group = self.mesh.group("pp")
        for _, parameter in sorted(
            ((name, parameter) for name, parameter in self.named_parameters() if name in shared),
            key=lambda pair: pair[0],
        ):
            gradient = as_local(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
            other = torch.empty_like(gradient)
            mine = gradient.clone()
            sent = dist.isend(mine, group=group, group_dst=self._shared_with)
            dist.recv(other, group=group, group_src=self._shared_with)
            assert sent is not None
            sent.wait()
            gradient.add_(other)


def _find_kind(parameter: nn.Parameter) -> object:
    """Tell apart what no optimizer updates in one call: plain tensors, and DTensors of different meshes."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def cut(
    model: nn.Module, rows: ModelRows, plan: Plan, mesh: PlanMesh, comm: DeepSeekComm | None = None
) -> ParallelModel:
    """Cut `model` by `plan`, in place, so that this rank holds its part; weights and the random seed are rank 0's.

    With `comm`, its algorithms carry the messages of data parallelism, and torch's own without.

    Raises `ConfigError` for a plan that cannot run on such a model, with the nearest one that can.
    """
    check_plan_runs(plan, rows.parts)
    if plan.recomputation != "none":
        raise ConfigError(
            f"recomputation={plan.recomputation!r} is applied to blocks before they are cut; call "
            "deepseek.checkpoint.activations.checkpoint_blocks_ on the model, and leave it 'none' in the plan"
        )
    broadcast_(model)
    tied = find_tied(model)
    chunks = _split_stages(model, rows, plan, mesh)
    expert_names = frozenset(name for chunk in chunks for name in _spread_experts(chunk.module, rows, plan, mesh))
    if plan.cp > 1 and rows.cut_sequences is not None:
        for chunk in chunks:
            rows.cut_sequences(chunk.module, build_ring(mesh))
    partial_names = frozenset(name for chunk in chunks for name in _cut_tensors(chunk.module, rows, plan, mesh))
    seed_ranks_(mesh)
    for chunk in chunks:
        _shard(chunk.module, rows, plan, mesh, expert_names, comm)
        if plan.pp > 1 and plan.schedule == "zero_bubble":
            chunk.weights = split_backward_(chunk.module)
    return ParallelModel(
        plan, mesh, chunks, tied=tied, partial_names=partial_names, expert_names=expert_names, comm=comm
    )


def build_ring(mesh: PlanMesh) -> SequenceRing:
    """Return the ranks that share a sequence with this one."""
    return SequenceRing(mesh.group("cp"), mesh.coordinate("cp"), mesh.plan.cp)


def broadcast_(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    for tensor in {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values():
        dist.broadcast(tensor.detach(), src=0)


def seed_ranks_(mesh: PlanMesh) -> None:
    """Let ranks draw random numbers from rank 0's seed: tensor parallel neighbors the same ones, all others their own.

    Dropout between the layers that are cut has to drop the same values on all tensor parallel ranks, or their copies of
    the activations part. A single rank is left as it is.
    """
    if mesh.plan.num_devices == 1:
        return
    seed = torch.tensor(torch.initial_seed() % 2**62, device=mesh.base.device_type)
    dist.broadcast(seed, src=0)
    plan = mesh.plan
    own = (mesh.coordinate("pp") * plan.dp + mesh.coordinate("dp")) * plan.cp + mesh.coordinate("cp")
    torch.manual_seed(int(seed) + own)


def _split_stages(model: nn.Module, rows: ModelRows, plan: Plan, mesh: PlanMesh) -> list[StageModule]:
    if plan.pp == 1:
        return [StageModule(PipelineStage(0, 1, 0, rows.parts.num_layers, rows.parts.num_layers), model, None)]
    assert rows.keep_stage is not None
    costs = torch.tensor(rows.list_costs(), dtype=torch.float64).to(mesh.base.device_type)
    dist.broadcast(costs, src=0)  # each rank may have measured others
    stages = split_layers(costs.tolist(), plan.pp * plan.virtual_stages)
    mine = stages[mesh.coordinate("pp") :: plan.pp]
    modules = [*(copy.deepcopy(model) for _ in mine[1:]), model]
    return [
        StageModule(stage, module, rows.keep_stage(module, stage)) for stage, module in zip(mine, modules, strict=True)
    ]


def _spread_experts(module: nn.Module, rows: ModelRows, plan: Plan, mesh: PlanMesh) -> list[str]:
    """Spread the experts of all layers, count loads over all tokens, and return the names of the experts' weights."""
    names = []
    groups = [mesh.group(mesh.data_axis)] if plan.dp * plan.cp > 1 else []
    groups += [mesh.group("tp")] if plan.tp > 1 and plan.sequence_parallel else []
    for name, router in match_modules(module, rows.routers).items() if rows.routers else ():
        if not hasattr(router, "experts"):
            continue
        if groups:
            balance_over_ranks_(router, groups)
        if plan.ep > 1:
            spread_experts_(router, mesh.group("ep"))
            names += [f"{name}.experts.{weight}" for weight, _ in cast("Any", router).experts.named_parameters()]
    return names


def _cut_tensors(module: nn.Module, rows: ModelRows, plan: Plan, mesh: PlanMesh) -> list[str]:
    """Apply the rows to what this stage holds, and return the names of weights whose gradients are parts of a sum."""
    if plan.tp == 1:
        return []
    tensor = TensorParallel(mesh.dense["tp"], plan.sequence_parallel)
    table = [(pattern, style) for pattern, style in rows.tensor if plan.pp == 1 or match_modules(module, pattern)]
    apply_rows(module, table, tensor)
    partial = {id(parameter) for parameter in tensor.partial_parameters}
    return [name for name, parameter in module.named_parameters() if id(parameter) in partial]


def _shard(
    module: nn.Module,
    rows: ModelRows,
    plan: Plan,
    mesh: PlanMesh,
    expert_names: frozenset[str],
    comm: DeepSeekComm | None,
) -> None:
    if plan.zero_stage == 0 or plan.dp * plan.cp == 1:
        return
    names = mesh.dense.mesh_dim_names or ()
    axes = ("dp_replica", "dp_shard") if "dp_shard" in names else (mesh.data_axis,)
    found = match_modules(module, rows.blocks).values() if rows.blocks else ()
    blocks = [block for block in found if any(True for _ in block.parameters())]
    ignored = {parameter for name, parameter in module.named_parameters() if name in expert_names}
    shard_(module, blocks, mesh.dense[axes], plan.zero_stage, ignored, comm)
