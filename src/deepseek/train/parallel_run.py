"""A run under a plan: which part of each step this rank does, and its state as one process would have it.

    config, plan -> split_step -> the same rows of each step, dealt over the dp ranks
    model -> cut (`ds.parallelize`) -> pieces on the ranks, which learn
          -> a whole copy on rank 0, which is evaluated and saved

What is learned is the config's business and the plan only says where: the rows of a step and the learning rate are the
same under every plan, so losses differ by rounding alone. State goes through whole tensors, one at a time: a checkpoint
and an artifact are the files that one process writes, and each can be taken up under another plan. Rank 0 holds a copy
of the whole model for that; every rank reads the whole checkpoint when it goes on, so the folder has to be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek.core.divisors import list_divisors
from deepseek.core.errors import ConfigError
from deepseek.data.batching import BatchLoader
from deepseek.data.config import DataConfig
from deepseek.data.samples import SampleLoader
from deepseek.distributed.parallel.legality import describe, list_nearest
from deepseek.distributed.parallel.parallel_model import ParallelModel
from deepseek.distributed.parallel.sequence_ring import SequenceRing, cut_batches
from deepseek.distributed.plan import Plan
from deepseek.distributed.schedules import order_work
from deepseek.mixed_precision.forward_precision import Precision, autocast
from deepseek.models.parallelizing import list_model_rows, parallelize
from deepseek.optim.optimizers import JointOptimizer
from deepseek.train.config import TrainConfig
from deepseek.train.own_loop import move
from deepseek.train.ranks import Ranks
from deepseek.train.task import Loader, Task

_POLICIES = {"none": "none", "selective": "selective", "full": "block"}
"""Recomputation of a plan -> `ds_activation_checkpoint` of a run."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


PlanChooser = Callable[[TrainConfig, int], Plan]
"""Chooses a plan for a run on so many ranks."""


def choose_plan(plan: Plan | PlanChooser, config: TrainConfig, ranks: Ranks | None) -> Plan:
    """Return the plan that was given, or the one that rank 0 chooses."""
    if isinstance(plan, Plan):
        return plan
    return plan(config, 1) if ranks is None else ranks.share(lambda: plan(config, ranks.world_size))


def apply_settings(config: TrainConfig, plan: Plan) -> TrainConfig:
    """Return `config` with what `plan` says of a run besides where it computes: what is recomputed.

    Raises `ConfigError` where the config says otherwise, and for settings that no plan of several ranks can have yet.
    """
    policy = _POLICIES[plan.recomputation]
    if policy != "none":
        if config.ds_activation_checkpoint not in ("none", policy):
            raise ConfigError(
                f"the plan has recomputation={plan.recomputation} and the run ds_activation_checkpoint="
                f"{config.ds_activation_checkpoint}; leave one of them out"
            )
        config = config.override({"ds_activation_checkpoint": policy})
    if plan.num_devices > 1:
        refuse_unsupported(config, plan)
    return config


def refuse_unsupported(config: TrainConfig, plan: Plan) -> None:
    """Raise `ConfigError` for a setting that goes with one process alone, or not with such a plan."""
    is_plain = plan.dp == plan.num_devices and plan.zero_stage == 0 and plan.ep == 1
    is_cut = plan.tp > 1 or plan.pp > 1
    rules = (
        (config.adapter is not None, "adapter is saved by one process; leave the plan out, or merge the adapter first"),
        (config.precision == "dynamic", "precision=dynamic decides in one process; set precision=bf16 or fp32"),
        (config.ds_memory_profiler, "ds_memory_profiler watches one process; set ds_memory_profiler=false"),
        (
            isinstance(config.ds_activation_checkpoint, float),
            "ds_activation_checkpoint as a share is measured on a whole model; set selective, block or full",
        ),
        (
            config.compile != "none" and not is_plain,
            f"compile={config.compile} goes with plans that cut nothing, dp alone; set compile=none",
        ),
        (
            config.task.kind == "distillation" and is_cut,
            "distillation needs whole logits beside the teacher's, and tp and pp leave none; use dp and zero_stage",
        ),
    )
    for is_broken, sentence in rules:
        if is_broken:
            raise ConfigError(f"{sentence} (plan {describe(plan)})")


def split_step(config: TrainConfig, plan: Plan) -> TrainConfig:
    """Return `config` with micro-batches that the dp ranks of `plan` can deal out, of the same rows a step.

    They have `micro_batch_size` rows where the plan has more than 1, else those of the config, or the largest number
    below that deals a step evenly and keeps the stages of a pipeline busy. Raises `ConfigError` where none does.

    >>> split = split_step(TrainConfig.from_dict({"data": {"batch_size": 16}}), Plan(dp=4))
    >>> split.data.rows_per_batch, split.accum_steps
    (4, 4)
    """
    rows, num_batches, dp, asked = config.data.rows_per_batch, config.accum_steps, plan.dp, plan.micro_batch_size
    num_rows = rows * num_batches
    if isinstance(config.data, DataConfig) and config.data.batching == "token_budget":
        if num_batches % dp or asked > 1:
            raise ConfigError(
                f"data.batching=token_budget makes whole batches, which the plan {describe(plan)} cannot cut; set "
                f"accum_steps={num_batches} to a multiple of dp={dp}, and leave micro_batch_size out"
            )
        return config
    if num_rows % dp:
        raise ConfigError(
            f"dp={dp} does not divide the {num_rows} rows of a step (data.batch_size={rows}, accum_steps="
            f"{num_batches}); choose one of {', '.join(map(str, list_divisors(num_rows)))}, or change data.batch_size "
            "or accum_steps"
        )
    if asked > 1 and num_rows // dp % asked:
        raise ConfigError(
            f"micro_batch_size={asked} does not divide the {num_rows // dp} rows that each of dp={dp} ranks has of a "
            f"step; choose one of {', '.join(map(str, list_divisors(num_rows // dp)))}"
        )
    size = asked if asked > 1 else _choose_size(rows, num_rows // dp, plan)
    order_work(plan.schedule, plan.pp, 0, num_rows // dp // size, plan.virtual_stages)  # or says why it cannot
    return config if size == rows else config.override({"data.batch_size": size, "accum_steps": num_rows // size})


def _choose_size(rows: int, rows_of_rank: int, plan: Plan) -> int:
    """Choose the rows of a micro-batch: up to `rows`, and fewer where a pipeline would stand idle for long."""
    least = 2 * plan.pp if plan.pp > 1 else 1
    divisor = plan.pp if plan.schedule == "interleaved" else 1
    counts = {size: rows_of_rank // size for size in list_divisors(rows_of_rank) if size <= rows}
    return max((size for size, count in counts.items() if count >= least and count % divisor == 0), default=1)


def check_batches(loader: Loader, config: TrainConfig, split: TrainConfig) -> None:
    """Raise `ConfigError` where batches had to become smaller, and the task does not ask how large they are."""
    rows, wanted = config.data.rows_per_batch, split.data.rows_per_batch
    follows = isinstance(loader, BatchLoader) or (isinstance(loader, SampleLoader) and loader.batch_size == wanted)
    if rows != wanted and not follows:
        raise ConfigError(
            f"the plan needs micro-batches of {wanted} rows, and the task's loader does not make as many as "
            "config.data.batch_size says; read it in open_data, or set accum_steps to a multiple of dp"
        )


def deal_(loader: Loader, rank: int, world_size: int) -> Loader:
    """Let `loader` give batch `rank` of each `world_size` of one order, in place where it can."""
    if isinstance(loader, BatchLoader | SampleLoader):
        loader.rank, loader.world_size = rank, world_size
        return loader
    return DealtLoader(loader, rank, world_size)


class DealtLoader:
    """Every `world_size`-th batch of a loader that knows of no ranks; the others are loaded and left."""

    def __init__(self, loader: Loader, rank: int, world_size: int) -> None:
        self._loader = loader
        self.rank, self.world_size = rank, world_size

    def next_batch(self) -> Any:
        """Return this rank's batch of the next `world_size`."""
        return [self._loader.next_batch() for _ in range(self.world_size)][self.rank]

    def state_dict(self) -> dict[str, Any]:
        """Return the position of all ranks."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position."""
        self._loader.load_state_dict(state)


@dataclass(frozen=True)
class PlanLearner:
    """A task as `ParallelModel` sees it: in the precision of the run, and without logits where nobody needs them."""

    task: Task
    precision: Precision
    device: torch.device
    is_whole: bool
    """Whether a rank computes the whole loss of its batches, from whole logits."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the outputs of the model, or of its stage."""
        with autocast(self.precision, self.device):
            loss = self.task.loss_without_outputs(model, batch) if self.is_whole else None
            return self.task.forward(model, batch) if loss is None else _Loss(loss)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the () sum of the loss over the units of a batch."""
        return outputs.value if isinstance(outputs, _Loss) else self.task.loss(outputs, batch)

    def count_units(self, batch: Any) -> int:
        """Count the units of a batch."""
        return self.task.count_units(batch)

    def cut_sequence(self, batch: Any, ring: SequenceRing) -> Any:
        """Return the tokens of a batch that lie on this rank, where the task says how it is cut."""
        return cut_batches(self.task, [batch], ring)[0]


@dataclass(frozen=True)
class _Loss:
    """A loss that was computed without outputs."""

    value: Tensor


class ParallelRun:
    """What a rank has of a run under a plan, and the way from there to the state of one process and back."""

    def __init__(
        self,
        plan: Plan,
        parallel: ParallelModel,
        ranks: Ranks,
        whole: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        group_names: Sequence[Sequence[Sequence[str]]],
    ) -> None:
        self.plan = plan
        self.model = parallel
        self.ranks = ranks
        self.whole = whole
        """The copy on rank 0; `None` on all others."""
        self._parts = list_parts(optimizer)
        self._is_joint = isinstance(optimizer, JointOptimizer)
        self._group_names = group_names
        self._origins = [
            _hold_pieces_(part, names, parallel) for part, names in zip(self._parts, group_names, strict=True)
        ]
        if isinstance(optimizer, JointOptimizer):
            optimizer.param_groups = [group for part in self._parts for group in part.param_groups]
        self._norms = [
            module
            for root in parallel.modules
            for module in root.modules()
            if isinstance(module, _BATCH_NORMS) and module.running_mean is not None
        ]

    @property
    def description(self) -> str:
        """The settings of the plan that are not the defaults."""
        return describe(self.plan)

    def move(self, batch: Any) -> Any:
        """Return `batch` on the device of this rank."""
        return move(batch, self._device)

    def build_learner(self, task: Task, precision: Precision) -> PlanLearner:
        """Build what the parallel model asks about batches."""
        is_whole = self.plan.tp == 1 and self.plan.pp == 1
        return PlanLearner(task, precision, self._device, is_whole)

    @torch.no_grad()
    def average_statistics_(self) -> None:
        """Give every rank the mean of the statistics that batch norms have seen on the dp ranks."""
        if self.plan.dp == 1 or not self._norms:
            return
        buffers = [
            buffer for norm in self._norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None
        ]
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.all_reduce(flat, group=self.model.mesh.group("dp"))
        flat /= self.plan.dp
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))

    @torch.no_grad()
    def refresh_whole(self) -> None:
        """Give the whole model on rank 0 the weights and buffers that the ranks hold; all ranks call it."""
        held = dict(self._gather_each(dict(self.model.named_parameters())))
        if self._is_leader:
            held |= self._list_buffers()
        found = self._collect(held)
        if self.whole is None:
            return
        targets = dict(self.whole.named_parameters())
        assert targets.keys() <= found.keys(), f"no rank holds {sorted(targets.keys() - found.keys())}"
        targets |= dict(self.whole.named_buffers())  # type: ignore[arg-type]
        for name, tensor in found.items():
            targets[name].copy_(tensor)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's pieces out of the state of a whole model."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.model.cut(name, weights[name], parameter))
        for name, buffer in self._list_buffers().items():
            buffer.copy_(weights[name])

    @torch.no_grad()
    def gather_optimizer(self) -> dict[str, Any]:
        """Return the optimizer's state as one process would have it, on rank 0; all ranks call it."""
        states = [
            self._gather_part(part, names, origins)
            for part, names, origins in zip(self._parts, self._group_names, self._origins, strict=True)
        ]
        return {"parts": states} if self._is_joint else states[0]

    @torch.no_grad()
    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Take this rank's pieces out of the optimizer's state of one process."""
        states = state["parts"] if self._is_joint else [state]
        held = dict(self.model.named_parameters())
        for part, saved, group_names, origins in zip(
            self._parts, states, self._group_names, self._origins, strict=True
        ):
            names = [name for group in group_names for name in group]
            part.state.clear()
            for index, values in saved["state"].items():
                parameter = held.get(names[int(index)])
                if parameter is not None:
                    part.state[parameter] = {
                        key: self._cut_value(names[int(index)], value, parameter) for key, value in values.items()
                    }
            for group, origin in zip(part.param_groups, origins, strict=True):
                group |= {key: value for key, value in saved["param_groups"][origin].items() if key != "params"}

    def gather_pieces(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors of pieces that are cut as the parameters of their names, on rank 0; all call it."""
        return self._collect(dict(self._gather_each(pieces)))

    def cut_pieces(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's pieces of whole tensors, cut as the parameters of their names."""
        return {
            name: self.model.cut(name, wholes[name], parameter)
            for name, parameter in self.model.named_parameters()
            if name in wholes
        }

    def capture_rng(self) -> dict[str, Any]:
        """Return the random numbers of all ranks; all ranks call it."""
        return {"plan": self.plan.as_dict(), "torch": self.ranks.collect(torch.get_rng_state())}

    def restore_rng(self, state: Mapping[str, Any] | None) -> None:
        """Go on with the random numbers of `state` under the same plan, else with ones drawn from rank 0's."""
        if state is not None and state["plan"] == self.plan.as_dict():
            torch.set_rng_state(state["torch"][self.ranks.rank])
            return
        mesh, plan = self.model.mesh, self.plan
        drawn = self.ranks.share(lambda: int(torch.randint(2**62, ())))
        own = (mesh.coordinate("pp") * plan.dp + mesh.coordinate("dp")) * plan.cp + mesh.coordinate("cp")
        torch.manual_seed(drawn + own)

    @property
    def _device(self) -> torch.device:
        parameter = next(self.model.module.parameters())
        return parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device

    @property
    def _is_leader(self) -> bool:
        """Whether this rank speaks for its stage."""
        return all(self.model.mesh.coordinate(axis) == 0 for axis in ("dp", "cp", "tp"))

    def _list_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that are saved."""
        return {
            name: buffer
            for module in self.model.modules
            for name, buffer in module.state_dict(keep_vars=True).items()
            if not isinstance(buffer, nn.Parameter)
        }

    def _gather_each(self, pieces: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors by name on the rank that speaks for its stage; the others only help, one at a time."""
        for name, piece in pieces.items():
            whole = self.model.gather(name, piece)
            if self._is_leader:
                yield name, whole

    def _collect(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return on rank 0 what the leaders of all stages hold."""
        plan, mesh = self.plan, self.model.mesh
        if plan.pp == 1 or not self._is_leader:
            return held
        group, device = mesh.group("pp"), self._device
        lists: list[Any] = [None] * plan.pp
        described = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()]
        dist.all_gather_object(lists, described, group=group)
        if mesh.coordinate("pp"):
            for tensor in held.values():
                dist.send(tensor.to(device).contiguous(), group=group, group_dst=0)
            return {}
        for stage in range(1, plan.pp):
            for name, shape, dtype in lists[stage]:
                tensor = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(tensor, group=group, group_src=stage)
                held.setdefault(name, tensor)
        return held

    def _gather_part(
        self, part: torch.optim.Optimizer, group_names: Sequence[Sequence[str]], origins: Sequence[int]
    ) -> dict[str, Any]:
        held: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            for key, value in part.state.get(parameter, {}).items():
                whole = self.model.gather(name, value) if value.ndim else value
                if self._is_leader:
                    held[f"{name}:{key}"] = whole
        found = self._collect(held)
        names = [name for group in group_names for name in group]
        index_of = {name: index for index, name in enumerate(names)}
        state: dict[int, dict[str, Tensor]] = {}
        for full_name, tensor in found.items():
            name, _, key = full_name.rpartition(":")
            state.setdefault(index_of[name], {})[key] = tensor
        groups, first = [], 0
        for index, own_names in enumerate(group_names):
            local = part.param_groups[origins.index(index)]
            settings = {key: value for key, value in local.items() if key != "params"}
            groups.append(settings | {"params": list(range(first, first + len(own_names)))})
            first += len(own_names)
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def _cut_value(self, name: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return a rank's piece of a moment; a number, such as the count of steps, stays whole."""
        if value.ndim:
            piece = self.model.cut(name, value, parameter)
            return piece if isinstance(piece, DTensor) else torch.empty_like(parameter, dtype=value.dtype).copy_(piece)
        return value.clone()


def list_parts(optimizer: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Return the optimizers that act as `optimizer`."""
    return optimizer.parts if isinstance(optimizer, JointOptimizer) else (optimizer,)


def name_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[list[str]]]:
    """Return the names in `model` of the parameters of each group of each part of `optimizer`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [[names[id(parameter)] for parameter in group["params"]] for group in part.param_groups]
        for part in list_parts(optimizer)
    ]


def _hold_pieces_(
    part: torch.optim.Optimizer, group_names: Sequence[Sequence[str]], parallel: ParallelModel
) -> list[int]:
    """Let an optimizer of the whole model update the pieces of a rank; return which group each of its groups was.

    A group is split where no optimizer could update it in one call. One that this rank has nothing of stays, empty,
    since it carries settings that are saved.
    """
    held = dict(parallel.named_parameters())
    kind_of = {
        id(parameter): kind for kind, group in enumerate(parallel.parameter_groups()) for parameter in group["params"]
    }
    groups, origins = [], []
    for origin, (group, names) in enumerate(zip(part.param_groups, group_names, strict=True)):
        by_kind: dict[int, list[nn.Parameter]] = {}
        for parameter in (held[name] for name in names if name in held):
            by_kind.setdefault(kind_of[id(parameter)], []).append(parameter)
        for parameters in by_kind.values() or ([],):
            groups.append({**group, "params": parameters})
            origins.append(origin)
    part.param_groups[:] = groups
    return origins


def cut_run(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, ranks: Ranks, whole: nn.Module | None
) -> ParallelRun:
    """Cut `model` by `plan` in place, and let `optimizer`, which was built for all of it, update this rank's pieces.

    `whole` is a copy of the model on rank 0. Raises `ConfigError` for a plan that is for another number of ranks, with
    the nearest ones that are not, and for one that cannot run on such a model.
    """
    if plan.num_devices != ranks.world_size:
        nearest = list_nearest(plan, list_model_rows(model).parts, ranks.world_size)
        raise ConfigError(
            f"the plan {describe(plan)} is for {plan.num_devices} ranks and there are {ranks.world_size}; start "
            f"{plan.num_devices}, or take one of the nearest plans for {ranks.world_size}: "
            f"{'; '.join(map(describe, nearest))}"
        )
    group_names = name_groups(optimizer, model)
    parallel = parallelize(model, replace(plan, recomputation="none"))
    return ParallelRun(plan, parallel, ranks, whole, optimizer, group_names)
