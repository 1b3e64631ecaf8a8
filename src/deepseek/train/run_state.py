"""Everything that lives while a run goes on: built from the config, taken up from a checkpoint, saved into one.

`loop.py` advances it. A checkpoint holds everything the next step depends on, so that a run which was stopped or killed
becomes bit-equal to one that never was.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from deepseek.checkpoint.activation_budget import checkpoint_within_budget_
from deepseek.checkpoint.activations import checkpoint_blocks_, find_blocks
from deepseek.checkpoint.restoring import Checkpoint, load, newest_valid
from deepseek.checkpoint.rng_state import capture_rng, restore_rng
from deepseek.checkpoint.saving import save
from deepseek.core.config import Config
from deepseek.core.errors import CheckpointError, ConfigError
from deepseek.mixed_precision.amp_levels import choose_level
from deepseek.mixed_precision.dynamic import DynamicPrecision
from deepseek.mixed_precision.forward_precision import Precision, autocast, choose_precision
from deepseek.models.adapters import attach_
from deepseek.models.decoder.model import count_parameters
from deepseek.nn.freezing import freeze_
from deepseek.nn.lora import LoRAConfig, find_adapted
from deepseek.optim.clipping import GradientBound, build_bound
from deepseek.optim.gradient_prediction import GradientPrediction
from deepseek.optim.learning_rates import scale_learning_rate
from deepseek.optim.optimizers import build_optimizer, load_optimizer_state
from deepseek.optim.schedule_free import averaged
from deepseek.train.config import TrainConfig
from deepseek.train.events import ActivationsCheckpointed, CheckpointSaved
from deepseek.train.memory_profile import PAGE, MemoryProfiler
from deepseek.train.own_loop import move
from deepseek.train.stopping import BestMetric
from deepseek.train.task import Loader, Task, TaskData
from deepseek.train.weight_average import WeightAverage

if TYPE_CHECKING:  # torch's parallel parts take a second to import, and most runs have one process
    from deepseek.distributed.plan import Plan
    from deepseek.train.parallel_run import ParallelRun
    from deepseek.train.ranks import Ranks

T = TypeVar("T")
CHECKPOINT_FOLDER = "checkpoints"
# Settings that a resumed run may change without becoming another run.
_FREE_SETTINGS = (
    "ds_activation_checkpoint",
    "folder",
    "resume_from",
    "num_steps",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "evaluate_every",
    "evaluation_units",
    "on_bad_step",
    "max_bad_steps",
    "ds_memory_profiler",
    "memory_profiler_step",
    "data.num_workers",
    "data.max_broken",
)


@dataclass(eq=False)
class BadSteps:
    """Steps whose loss or gradient was no number."""

    num_in_a_row: int = 0
    """Those since the last step that got further than all of them."""
    last: int = 0
    """The number of the last one."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Positions in the data whose step is left out, by those who went back before it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON values."""
        return {"num_in_a_row": self.num_in_a_row, "last": self.last, "left_out": list(self.left_out)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.num_in_a_row, self.last = int(state["num_in_a_row"]), int(state["last"])
        self.left_out = list(state["left_out"])


@dataclass(eq=False)
class Run:
    """Everything that lives while a run goes on."""

    config: TrainConfig
    task: Task
    data: TaskData
    model: nn.Module
    """What is evaluated and saved: the model, or under a plan a copy of it on rank 0, which is brought up to date for
    that; on other ranks the part that they hold."""
    num_parameters: int
    optimizer: torch.optim.Optimizer
    bound: GradientBound
    precision: Precision
    peak_learning_rate: float
    best: BestMetric
    """The best evaluation so far, by the metric of `config.stopping`."""
    average: WeightAverage | None = None
    """The moving average of the weights, where one is kept."""
    dynamic: DynamicPrecision | None = None
    """Chooses the precision of each layer, where that is asked for; `precision` then puts nothing around the model."""
    prediction: GradientPrediction | None = None
    """Damps steps before a divergence, where that is asked for."""
    checkpointed: ActivationsCheckpointed | None = None
    """Which blocks are recomputed in the backward pass, if any."""
    memory: MemoryProfiler | None = None
    """Watches the memory, where that is asked for."""
    parallel: ParallelRun | None = None
    """The pieces of the model that this rank trains, under a plan of several ranks."""
    bad_steps: BadSteps = field(default_factory=BadSteps)
    step: int = 0
    """Optimizer steps done."""
    saved_step: int = -1
    """Steps done when the newest checkpoint was saved; -1 where there is none."""
    evaluated_step: int = 0
    """Steps done at the last evaluation on the way."""

    @property
    def loader(self) -> Loader:
        """The batches that are trained on."""
        return self.data.loader

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's folder: the only one, or rank 0."""
        return self.parallel is None or self.parallel.ranks.is_first

    @property
    def trained_modules(self) -> list[nn.Module]:
        """The model, or the parts of it that this rank holds."""
        return [self.model] if self.parallel is None else self.parallel.model.modules

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of this process in a step."""
        num_batches = self.task.config.accum_steps
        return num_batches if self.parallel is None else num_batches // self.parallel.plan.dp

    def share(self, function: Callable[[], T]) -> T:
        """Call `function` where the run's folder is written, and return its result on all ranks."""
        return function() if self.parallel is None else self.parallel.ranks.share(function)

    @contextmanager
    def as_model(self) -> Iterator[None]:
        """The model has the weights that it would be saved with while the block runs: averages, where they are kept.

        All ranks enter the block, and only rank 0 has the whole model in it.
        """
        with self.average.swapped() if self.average is not None else averaged(self.optimizer):
            if self.parallel is not None:
                self.parallel.refresh_whole()
            yield


def build(
    config: TrainConfig, task: Task, folder: Path, *, plan: Plan | None = None, ranks: Ranks | None = None
) -> Run:
    """Assemble a new run, with the data that `task` prepared in `folder`; of several `ranks`, the part of this one."""
    device = open_device(config.device)
    data = task.open_data(folder)
    _seed(config.seed)
    model = task.build_model(data)
    config = replace_adapter(config, task)
    if plan is not None and ranks is not None:
        from deepseek.train.parallel_run import check_batches, cut_run, deal_, refuse_unsupported

        refuse_unsupported(config, plan)  # with the adapter that `init` may be
        check_batches(data.loader, config, task.config)
    if config.adapter is not None and not find_adapted(model):
        _attach(task, model, config.adapter)
    if config.freeze:
        freeze_(model, config.freeze)
    model.to(device).train()
    learning_rate = scale_learning_rate(
        config.sequences_per_step,
        base=config.optimizer.base_learning_rate,
        reference_batch_size=config.optimizer.reference_batch_size,
    )
    optimizer = build_optimizer(model, config.optimizer, learning_rate)
    num_parameters = count_parameters(model)
    whole = copy.deepcopy(model) if ranks is not None and ranks.is_first else None
    checkpointed = checkpoint_activations_(model, task, data, device)
    if config.compile == "blocks":
        compile_blocks_(model)
    precision, dynamic = open_precision(config, model, device)
    parallel = None
    if plan is not None and ranks is not None:
        precision = ranks.share(lambda: precision)  # measured, where it is chosen, and one run computes in one
        parallel = cut_run(model, optimizer, plan, ranks, whole)
        data = replace(data, loader=deal_(data.loader, parallel.model.mesh.coordinate("dp"), plan.dp))
    foreseeing = config.optimizer.gradient_prediction
    return Run(
        config,
        task,
        data,
        model if whole is None else whole,
        num_parameters,
        optimizer,
        build_bound(config.optimizer.grad_clip, config.optimizer.adaptive_clip, config.optimizer.adaptive_clip_window),
        precision,
        learning_rate,
        best=BestMetric(config.stopping.metric in task.lower_is_better, config.stopping.min_change),
        average=build_average(config, model, parallel),
        dynamic=dynamic,
        memory=open_memory_profiler(config, model, optimizer, device),
        prediction=None if foreseeing is None else GradientPrediction(foreseeing),
        checkpointed=checkpointed,
        parallel=parallel,
    )


def build_average(config: TrainConfig, model: nn.Module, parallel: ParallelRun | None) -> WeightAverage | None:
    """Build the average of the weights that `ema_decay` asks for, of what this rank holds of them."""
    if config.ema_decay is None:
        return None
    if parallel is None:
        return WeightAverage(model, config.ema_decay)
    from deepseek.distributed.parallel.data_parallel import as_local

    return WeightAverage(parallel.model, config.ema_decay, as_local=as_local)


def compile_blocks_(model: nn.Module) -> None:
    """Compile the blocks of `model` in place, those of one shape once.

    Blocks of one class share their code, and torch stops after a number of compilations of one code, those for training
    and for evaluation counted apart: the eight blocks of a ResNet-18 are more than it allows by itself.
    """
    import torch._dynamo as dynamo  # takes a second to import

    blocks = find_blocks(model)
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 2 * len(blocks))
    for name in blocks:
        model.get_submodule(name).compile()


def checkpoint_activations_(
    model: nn.Module, task: Task, data: TaskData, device: torch.device
) -> ActivationsCheckpointed | None:
    """Checkpoint the blocks of `model` as `ds_activation_checkpoint` says; `None` where it says nothing.

    A budget is measured on the first micro-batch. Which blocks are chosen does not change what is learned, so that a
    resumed run may choose others.
    """
    config = task.config
    wanted = config.ds_activation_checkpoint
    if wanted == "none":
        return None
    blocks = find_blocks(model)
    if not isinstance(wanted, float):
        checkpoint_blocks_(model, wanted, blocks=blocks)
        return ActivationsCheckpointed(wanted, len(blocks), tuple(blocks), None, None)
    position = data.loader.state_dict()
    inputs = task.inputs(move(data.loader.next_batch(), device))
    data.loader.load_state_dict(position)
    is_wide = choose_level(config.ds_amp_level) == "O0"
    # The dynamic precision keeps activations in bf16 as well.
    precision: Precision = "fp32" if is_wide else "bf16" if config.precision == "dynamic" else config.precision
    with autocast(precision, device):
        plan = checkpoint_within_budget_(model, inputs, memory_budget=wanted, blocks=blocks)
    chosen = plan.choice.recomputed
    return ActivationsCheckpointed(
        "budget", len(chosen), chosen, kept_before_bytes=plan.kept_before_bytes, kept_bytes=plan.choice.peak_bytes
    )


def open_precision(
    config: TrainConfig, model: nn.Module, device: torch.device
) -> tuple[Precision, DynamicPrecision | None]:
    """Build the precision of each forward pass, and the policy that chooses layer by layer where asked for."""
    level = choose_level(config.ds_amp_level)
    if level == "O2":
        raise ConfigError(
            "level O2 keeps 16-bit weights beside their masters, which the trainer does not; choose O1, "
            "or use PrecisionManager in a loop of your own"
        )
    if level == "O0":
        return "fp32", None
    if config.precision == "dynamic":
        # Measured seconds differ from process to process, and a resumed run must decide as the first one would.
        return "fp32", DynamicPrecision(model, costs="assumed")
    return choose_precision(config.precision, device), None


def open_memory_profiler(
    config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> MemoryProfiler | None:
    """Build the profiler that `ds_memory_profiler` asks for."""
    if not config.ds_memory_profiler:
        return None
    page = Path(config.folder) / PAGE
    return MemoryProfiler(model, optimizer, device, page, config.memory_profiler_step, config.log_every)


def open_device(name: str) -> torch.device:
    """Return the torch device `name`, tried out; `ConfigError` where this machine or this build of torch has none.

    >>> open_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device {name!r} cannot be used here ({reason}); choose cpu, or a device there is"
        ) from error
    return device


def _seed(seed: int) -> None:
    """Every generator that a layer or a hook of the user's may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def resume(run: Run) -> None:
    """Take up the newest valid checkpoint of the run's folder, or else the one that `resume_from` names, if any."""
    config = run.config
    checkpoint = find_newest(run)
    if checkpoint is None and config.resume_from is not None:
        checkpoint = load(config.resume_from)
    if checkpoint is None:
        return
    before, now = checkpoint.state.get("settings", {}), deciding_settings(config)
    now = {name: value for name, value in now.items() if name in before or not is_default(config, name)}
    if changed := find_changes(before, now):
        raise CheckpointError(
            f"{checkpoint.path} belongs to a run with other settings ({', '.join(changed[:3])}); "
            "go on with the settings it was started with, or choose another folder"
        )
    if checkpoint.step > config.num_steps:
        raise CheckpointError(
            f"{checkpoint.path} has done {checkpoint.step} steps and num_steps is {config.num_steps}; "
            "raise num_steps, or go on from an earlier checkpoint with resume_from in another folder"
        )
    restore(run, checkpoint)


def find_newest(run: Run) -> Checkpoint | None:
    """Find the newest valid checkpoint of the run's folder: the one that rank 0 finds, on every rank."""
    folder = Path(run.config.folder) / CHECKPOINT_FOLDER
    if run.parallel is None:
        return newest_valid(folder)
    found = newest_valid(folder) if run.is_first else None
    path = run.share(lambda: None if found is None else found.path)
    return found if run.is_first or path is None else load(path)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Bring the run to where it was when `checkpoint` was saved."""
    state = checkpoint.state
    if run.parallel is None:
        _restore_weights(run, checkpoint)
        load_optimizer_state(run.optimizer, state["optimizer"])
    else:
        run.parallel.load_weights(state["model"])
        run.parallel.load_optimizer(state["optimizer"])
    run.loader.load_state_dict(state["loader"])
    run.bound.load_state_dict(state.get("bound", {}))
    if run.average is not None:
        average = state["average"]
        if run.parallel is not None:
            average = average | {"averages": run.parallel.cut_pieces(average["averages"])}
        run.average.load_state_dict(average)
    if run.dynamic is not None:
        run.dynamic.load_state_dict(state["precision"])
    if run.prediction is not None:
        run.prediction.load_state_dict(state["prediction"])
    if "best" in state:
        run.best.load_state_dict(state["best"])
        run.bad_steps.load_state_dict(state["bad_steps"])
    if run.config.precision == "auto" and choose_level(run.config.ds_amp_level) == "O1":
        # The process that began has measured, maybe on another machine; one run computes in one precision.
        run.precision = state.get("forward_precision", run.precision)
    restore_rng(state["rng"])
    if run.parallel is not None:
        run.parallel.restore_rng(state.get("ranks_rng"))
    run.step = run.saved_step = checkpoint.step
    run.evaluated_step = state.get("evaluated_step", checkpoint.step)


def replace_adapter(config: TrainConfig, task: Task) -> TrainConfig:
    """Return `config` with the adapter that `init` brought along, if it was one."""
    return config if config.adapter is not None else config.model_copy(update={"adapter": task.config.adapter})


def _attach(task: Task, model: nn.Module, config: LoRAConfig) -> None:
    """Put adapters on the model that the task opened."""
    if task.start is None or task.start.model is not model:
        raise ConfigError(
            f"adapter is for models that init names, and {type(task).__name__} begins with one of its own; call "
            "open_init in its build_model"
        )
    attach_(task.start, config)


def _state_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint keeps of the weights: with an adapter, what is trained, and what it is trained on."""
    if run.parallel is not None:
        run.parallel.refresh_whole()
        return {"model": run.model.state_dict() if run.is_first else {}}
    state = run.model.state_dict()
    if run.config.adapter is None:
        return {"model": state}
    trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert run.task.start is not None
    return {"model": {name: state[name] for name in trained}, "base_digest": run.task.start.parent_digest}


def _restore_weights(run: Run, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    if run.config.adapter is not None and state["base_digest"] != _state_of(run)["base_digest"]:
        raise CheckpointError(
            f"{checkpoint.path} is of an adapter on other weights than those of init={run.config.init} now; give the "
            "model that the run began with, or choose another folder"
        )
    run.model.load_state_dict(state["model"], strict=run.config.adapter is None)


def deciding_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide the weights, by dotted name; runs that share them may share checkpoints."""
    settings = dict(flatten_settings(config.to_dict()))
    return {name: value for name, value in settings.items() if name not in _FREE_SETTINGS}


def is_default(config: Config, name: str) -> bool:
    """Return whether the setting of this dotted name has its default value.

    A setting that a checkpoint does not know is newer than the checkpoint, which was written under its default.
    """
    *parents, last = name.split(".")
    holder: Any = config
    for parent in parents:
        holder = getattr(holder, parent)
        if isinstance(holder, dict):  # keys of the user's own, of which none is there by default
            return False
    field = type(holder).model_fields.get(last)
    return field is not None and bool(field.get_default(call_default_factory=True) == getattr(holder, last))


def find_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the differences between two flat settings, one phrase for each.

    >>> find_changes({"num_steps": 650, "seed": 0}, {"num_steps": 700, "seed": 0})
    ['num_steps was 650 and is 700']
    """
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings with their dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flatten_settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def save_checkpoint(run: Run) -> CheckpointSaved:
    """Write everything the next step depends on, as one process would have it; all ranks call it."""
    began_s = time.perf_counter()
    parallel = run.parallel
    state: dict[str, Any] = {
        "settings": deciding_settings(run.config),
        **_state_of(run),
        "optimizer": run.optimizer.state_dict() if parallel is None else parallel.gather_optimizer(),
        "loader": run.loader.state_dict(),
        "bound": run.bound.state_dict(),
        "best": run.best.state_dict(),
        "evaluated_step": run.evaluated_step,
        "bad_steps": run.bad_steps.state_dict(),
        "rng": capture_rng(),
        "forward_precision": run.precision,
    }
    if run.average is not None:
        average = state["average"] = run.average.state_dict()
        if parallel is not None:
            average["averages"] = parallel.gather_pieces(average["averages"])
    if parallel is not None:
        state["ranks_rng"] = parallel.capture_rng()
    if run.dynamic is not None:
        state["precision"] = run.dynamic.state_dict()
    if run.prediction is not None:
        state["prediction"] = run.prediction.state_dict()
    folder = Path(run.config.folder) / CHECKPOINT_FOLDER
    path = run.share(lambda: save(folder, run.step, state, keep=run.config.keep_checkpoints))
    run.saved_step = run.step
    return CheckpointSaved(run.step, str(path), time.perf_counter() - began_s)
