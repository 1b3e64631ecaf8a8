"""Plans held against one process: does a run learn the same under them, step by step and weight by weight?

    config -> a small model like the run's, its first batches -> recorded here, in one process and in float64
           -> the same model and batches under each plan, on local ranks -> what parts first

The small model keeps what decides which plans are legal and how they cut: heads, experts, the vocabulary. Its layers
are fewer and its channels narrow. Dropout is off, since ranks draw other numbers than one process does; a balancing
bias and a capacity of experts are off, since they depend on which tokens pass together. A model that `init` names is
taken as it is. Ranks are started by torch's elastic launcher, one thread each, over gloo.
"""

from __future__ import annotations

import copy
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deepseek.core.errors import ConfigError, PermanentError
from deepseek.core.folder_lock import locked_folder
from deepseek.distributed.parallel.legality import ModelParts, check_plan_runs, describe, list_plans
from deepseek.distributed.parallel.parity import RELATIVE_TOLERANCE, BuildOptimizer, compare_steps, record_steps
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import list_model_rows, parallelize
from deepseek.nn.freezing import freeze_
from deepseek.train.config import TrainConfig
from deepseek.train.loop import DATA_FOLDER
from deepseek.train.task import Task
from deepseek.train.tasks import find_task

NARROW_TOLERANCE = 1e-4
"""What counts as rounding where a task computes its loss in float32, as a share of a tensor's largest value."""
_HEAD_SIZE, _FFN_SIZE, _SEQUENCE_LENGTH, _BATCH_SIZE = 8, 32, 32, 2
_RENDEZVOUS_TIMEOUT_S = 120


@dataclass(frozen=True)
class OptimizerVerdict:
    """What training with one optimizer under a plan came to."""

    optimizer: str
    is_equal: bool
    largest_share: float
    """Largest difference, as a share of what rounding may come to."""
    num_compared: int
    first_parting: str | None
    """The first value that differs, in a sentence."""


@dataclass(frozen=True)
class PlanVerdict:
    """What one plan came to."""

    plan: dict[str, object]
    description: str
    verdicts: tuple[OptimizerVerdict, ...]

    @property
    def is_equal(self) -> bool:
        """Whether all was equal but for rounding."""
        return all(verdict.is_equal for verdict in self.verdicts)


@dataclass(frozen=True)
class SmallRun:
    """What is trained: a task, the small model that it begins with, and batches for the steps."""

    task: Task
    model: nn.Module
    tolerance: float

    @property
    def parts(self) -> ModelParts:
        """What plans may cut of it; sequences where the task says how as well."""
        parts = list_model_rows(self.model).parts
        return replace(parts, has_context_rows=parts.has_context_rows and hasattr(self.task, "cut_sequence"))


def verify_plans(
    config: TrainConfig,
    plans: Sequence[Plan] = (),
    *,
    num_ranks: int = 2,
    num_steps: int = 2,
    task: type[Task] | None = None,
) -> Iterator[PlanVerdict]:
    """Hold each plan against one process, for `num_steps` steps with SGD and as many with AdamW.

    Without `plans`, all that can run on `num_ranks` ranks are tried. The data of the run are prepared in its folder, as
    training would. Raises `ConfigError` for a plan that cannot run on the model, and `PermanentError` where a rank
    fails.
    """
    if num_steps < 1:
        raise ConfigError(f"{num_steps} steps compare nothing; give at least 1")
    subject, batches = build_subject(config, task, plans, num_ranks, num_steps)
    chosen = list(plans) or list_plans(subject.parts, num_ranks)
    for plan in chosen:
        check_plan_runs(plan, subject.parts)
    for world_size in sorted({plan.num_devices for plan in chosen}):
        group = [plan for plan in chosen if plan.num_devices == world_size]
        taken = [step[: max(world_size, 2)] for step in batches]
        yield from launch(world_size, _verify_on_rank, subject, taken, group)


def build_subject(
    config: TrainConfig, task: type[Task] | None, plans: Sequence[Plan], num_ranks: int, num_steps: int
) -> tuple[SmallRun, list[list[Any]]]:
    """Build the small model of a run and draw its first batches: enough of each step for the largest plan."""
    if config.adapter is not None:
        raise ConfigError("plans are held against whole models and adapter is set; leave it out")
    num_stages = max((plan.pp * plan.virtual_stages for plan in plans), default=0) or 2 * num_ranks
    small = shrink(config, num_stages)
    learned = (task or find_task(small.task.kind))(small)
    folder = Path(config.folder) / DATA_FOLDER
    with locked_folder(Path(config.folder)):
        for _ in learned.prepare(folder):
            pass
        data = learned.open_data(folder)
    torch.manual_seed(small.seed)
    model = learned.build_model(data)
    if config.freeze:
        freeze_(model, config.freeze)
    settle_randomness_(model.double().train())
    largest = max([plan.num_devices for plan in plans] or [num_ranks])
    batches = [[data.loader.next_batch() for _ in range(max(largest, 2))] for _ in range(num_steps)]
    widen_inputs_(model)
    dtype = learned.loss(learned.forward(model, batches[0][0]), batches[0][0]).dtype
    tolerance = RELATIVE_TOLERANCE if dtype == torch.float64 else NARROW_TOLERANCE
    return SmallRun(learned, model, tolerance), batches


def shrink(config: TrainConfig, num_stages: int) -> TrainConfig:
    """Return the config of a small run: narrow channels, few layers, short rows, and as many heads and experts.

    >>> small = shrink(TrainConfig(), num_stages=4).model
    >>> small.num_layers, small.num_heads, small.hidden_size
    (4, 4, 32)
    """
    changes: dict[str, Any] = {}
    if config.init is None:
        model = config.model
        head_size = max(2, math.ceil(_HEAD_SIZE / max(model.rope_fraction, 1 / 4) / 2) * 2)
        changes |= {
            "model.num_layers": min(model.num_layers, max(num_stages, 2)),
            "model.hidden_size": head_size * model.num_heads,
            "model.head_size": head_size,
            "model.ffn_size": min(model.ffn_size, _FFN_SIZE + model.ffn_size % 8),
        }
        changes |= {"model.moe.ffn_size": _FFN_SIZE} if model.moe else {}
    settings = type(config.data).model_fields
    short = {"sequence_length": _SEQUENCE_LENGTH, "batch_size": _BATCH_SIZE}
    changes |= {
        f"data.{name}": min(value, getattr(config.data, name)) for name, value in short.items() if name in settings
    }
    return config.override(changes)


def settle_randomness_(model: nn.Module) -> None:
    """Switch off what depends on random numbers or on which tokens pass together: dropout, balancing, capacities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
            module.p = 0.0
        for name, value in (("dropout", 0.0), ("attention_dropout", 0.0), ("balance_rate", 0.0)):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, value)
        if hasattr(module, "capacity_factor"):
            module.capacity_factor = None  # type: ignore[assignment]


def widen_inputs_(model: nn.Module) -> None:
    """Let `model` take inputs in float32 though its weights are in float64."""
    model.register_forward_pre_hook(_widen, with_kwargs=True)


def _widen(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(widen(value) for value in inputs), {name: widen(value) for name, value in named.items()}


def launch(world_size: int, function: Any, *arguments: Any) -> Any:
    """Run `function(*arguments)` on local ranks by torch's elastic launcher, and return what rank 0 returned."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": _RENDEZVOUS_TIMEOUT_S},
        max_restarts=0,
        start_method="spawn",
    )
    with _one_thread():
        try:
            return elastic_launch(config, function)(*arguments)[0]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise PermanentError(
                f"rank {rank} of {world_size} failed ({failure.message.strip().splitlines()[-1][:300]}); "
                "the output above has its traceback"
            ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let the processes that are started in the block compute with one thread each: ranks share the cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _verify_on_rank(subject: SmallRun, batches: list[list[Any]], plans: Sequence[Plan]) -> list[PlanVerdict]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        return [verify_plan(subject, batches, plan) for plan in plans]
    finally:
        dist.destroy_process_group()


def verify_plan(subject: SmallRun, batches: list[list[Any]], plan: Plan) -> PlanVerdict:
    """Hold one plan against one process; every rank calls it."""
    verdicts = []
    for name, build_optimizer in OPTIMIZERS.items():
        records = record_steps(copy.deepcopy(subject.model), subject.task, batches, build_optimizer)
        parallel = parallelize(copy.deepcopy(subject.model), plan)
        parity = compare_steps(parallel, subject.task, batches, records, build_optimizer, tolerance=subject.tolerance)
        first = parity.partings[0].describe() if parity.partings else None
        verdicts.append(OptimizerVerdict(name, parity.is_equal, parity.largest_share, parity.num_compared, first))
    return PlanVerdict(plan.as_dict(), describe(plan), tuple(verdicts))


def _build_sgd(groups: list[dict[str, list[nn.Parameter]]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


def _build_adamw(groups: list[dict[str, list[nn.Parameter]]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


OPTIMIZERS: dict[str, BuildOptimizer] = {"sgd": _build_sgd, "adamw": _build_adamw}
"""SGD shows a wrong scale of gradients, which AdamW hides."""
