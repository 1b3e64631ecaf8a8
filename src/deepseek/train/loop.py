"""The training loop: a generator of events from a config to a finished model.

    for event in train(config):
        print(event)

    task: data -> model, batches -> [step, ..., evaluation, checkpoint] -> artifact

What is learned is a task's business (`task.py`). Whoever iterates decides when it stops: closing the generator (or
leaving the `for` with Ctrl-C) between two steps saves a checkpoint first, so that the next `train(config)` goes on with
the next step. A process that is killed goes on from its last periodic checkpoint. Either way the weights become
bit-equal to those of a run that was never stopped, since everything a step depends on is in the checkpoint or a pure
function of the step's number (`run_state.py`).

A step whose loss or gradient is no number changes nothing. `on_bad_step` decides what follows: `skip` goes on with the
next batch, `rewind` goes back to the last checkpoint and leaves the batch out when it comes again, `stop` ends the run
with the batch's position; after `max_bad_steps` in a row the other two end it as well.

Under a plan every rank runs this loop, with the same numbers and the same decisions (`ranks.py`, `parallel_run.py`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from deepseek.artifact.reading import RUN_MODEL_NAME, read_manifest
from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError, TrainingError
from deepseek.core.events import Event
from deepseek.core.folder_lock import locked_folder
from deepseek.core.storage import new_folder, write_file
from deepseek.optim.learning_rates import schedule_factor
from deepseek.optim.optimizers import set_learning_rate
from deepseek.train.config import TrainConfig
from deepseek.train.evaluation import evaluate
from deepseek.train.events import (
    Evaluated,
    InitLoaded,
    ModelSaved,
    PlanApplied,
    RunRewound,
    RunStarted,
    StepDamped,
    StepDone,
    StepSkipped,
    StoppedEarly,
)
from deepseek.train.run_state import (
    Run,
    build,
    find_newest,
    flatten_settings,
    open_device,
    restore,
    resume,
    save_checkpoint,
)
from deepseek.train.steps import StepResult, take_parallel_step, take_step
from deepseek.train.task import LOSS, Task
from deepseek.train.tasks import find_task

if TYPE_CHECKING:
    from deepseek.distributed.plan import Plan
    from deepseek.train.parallel_run import PlanChooser
    from deepseek.train.ranks import Ranks

DATA_FOLDER, MODEL_FOLDER, BEST_FOLDER = "data", RUN_MODEL_NAME, "best"
CONFIG_FILE = "config.yaml"
"""Settings that the run in a folder was last started with."""


class RunEvents(Generator[Event, None, None]):
    """The events of a run, which works while they are read; one that is dropped unread says that nothing was done."""

    def __init__(self, events: Generator[Event, None, None]) -> None:
        self._events = events
        self._is_begun = False

    def send(self, value: None) -> Event:
        """Work until the next event."""
        self._is_begun = True
        return self._events.send(value)

    def throw(self, *error: Any) -> Event:
        """Raise `error` where the run stands."""
        self._is_begun = True
        return self._events.throw(*error)

    def close(self) -> None:
        """End the run, which saves itself."""
        self._is_begun = True
        self._events.close()

    def __del__(self) -> None:
        if not self._is_begun:
            warn_caller(
                "train(config) was called and nothing was trained, since a run works while its events are read; "
                "write `for event in train(config): ...`"
            )


def train(config: TrainConfig, *, task: type[Task] | None = None, plan: Plan | PlanChooser | None = None) -> RunEvents:
    """Train from `config`, or go on with it where an earlier call was stopped; the model is in `folder/model`.

    `task` is a task of your own instead of the one that `config.task` names. Under a `plan` of several ranks, all of
    which call this, rank 0 has the events and writes the folder; a function chooses a plan for a config and a number of
    ranks, and is called on rank 0. Raises `ConfigError`, `DataError`, `TrainingError`,
    `CheckpointError`, `CommunicationError` or `StorageError`, the last where another run is at work in the folder.
    """
    return RunEvents(_train(config, task, plan))


def _train(
    config: TrainConfig, task: type[Task] | None, plan: Plan | PlanChooser | None
) -> Generator[Event, None, None]:
    open_device(config.device)
    if plan is None:
        with locked_folder(Path(config.folder)):
            yield from train_in_locked_folder(config, task=task)
        return
    from deepseek.train.parallel_run import apply_settings, choose_plan
    from deepseek.train.ranks import joined

    with joined(config, None if callable(plan) else plan) as ranks:
        chosen = choose_plan(plan, config, ranks)
        config = apply_settings(config, chosen)
        is_first = ranks is None or ranks.is_first
        with locked_folder(Path(config.folder)) if is_first else nullcontext():
            yield from train_in_locked_folder(config, task=task, plan=chosen, ranks=ranks)


def train_in_locked_folder(
    config: TrainConfig, *, task: type[Task] | None = None, plan: Plan | None = None, ranks: Ranks | None = None
) -> Generator[Event, None, None]:
    """Train as `train` does, for a caller who holds the folder's lock for longer, and has joined the ranks."""
    open_device(config.device)
    folder = Path(config.folder) / DATA_FOLDER
    own = config
    if plan is not None:
        from deepseek.train.parallel_run import split_step

        own = split_step(config, plan)
    learned = (task or find_task(config.task.kind))(own)
    if ranks is None:
        yield from learned.prepare(folder)
        yield from _train_prepared(config, learned, folder)
        return
    assert plan is not None
    from deepseek.train.ranks import digest_code, in_step

    settings = dict(flatten_settings(config.to_dict())) | plan.as_dict()
    ranks.require_alike(settings, digest_code(type(learned)))
    if ranks.is_first:
        yield from learned.prepare(folder)
    ranks.share(lambda: None)  # the others open what rank 0 has prepared
    yield from in_step(_train_prepared(config, learned, folder, plan=plan, ranks=ranks), ranks)


def _train_prepared(
    config: TrainConfig, learned: Task, folder: Path, *, plan: Plan | None = None, ranks: Ranks | None = None
) -> Generator[Event, None, None]:
    """Train on data that are there; every rank comes by the same events."""
    run = build(config, learned, folder, plan=plan, ranks=ranks)
    if learned.start is not None:
        yield InitLoaded(learned.start.summary, learned.start.new_tensors, learned.start.parent_digest)
    resume(run)
    if run.is_first:
        write_file(Path(config.folder) / CONFIG_FILE, yaml.safe_dump(run.config.to_dict(), sort_keys=False).encode())
    yield RunStarted(
        num_parameters=run.num_parameters,
        task=config.task.kind if type(learned) is find_task(config.task.kind) else type(learned).__name__,
        unit=learned.unit,
        num_train_units=run.data.num_train_units,
        precision=run.precision if run.dynamic is None else "dynamic",
        first_step=run.step,
        num_steps=config.num_steps,
        learning_rate=run.peak_learning_rate,
    )
    if run.parallel is not None:
        yield PlanApplied(
            run.parallel.description,
            run.parallel.ranks.world_size,
            run.num_micro_batches,
            learned.config.data.rows_per_batch,
        )
    if run.checkpointed is not None:
        yield run.checkpointed
    try:
        yield from _take_steps(run)
    except GeneratorExit:
        # The reader left between two steps, where the state is whole.
        if run.step > run.saved_step:
            save_checkpoint(run)
        raise
    yield from _finish(run)


def _take_steps(run: Run) -> Iterator[Event]:
    config = run.config
    if config.on_bad_step == "rewind" and run.saved_step < 0:
        yield save_checkpoint(run)  # the first steps may be bad, too
    num_units, began_s = 0, time.perf_counter()
    yield from _look_and_save(run)  # what an interruption kept from being done
    while run.step < config.num_steps and not _is_patience_over(run):
        position = _find_position(run)
        with run.memory.watching(run.step + 1) if run.memory is not None else nullcontext():
            result = _take_one(run)
        if result.is_taken:
            yield from _follow(run, result)
            num_units += result.num_units
            if run.step % config.log_every == 0 or run.step in (1, config.num_steps):
                now_s = time.perf_counter()
                yield _describe(run, result, num_units / (now_s - began_s))
                num_units, began_s = 0, now_s
        else:
            yield from _answer_bad_step(run, result, position)
        yield from _look_and_save(run)


def _look_and_save(run: Run) -> Iterator[Event]:
    """Evaluate and save, where either is due at this step, taken or skipped, and was not done yet.

    What an evaluation decides is in the state before its event is read, so that a reader who leaves loses nothing.
    """
    config = run.config
    is_between = config.evaluate_every and run.step % config.evaluate_every == 0 and run.step < config.num_steps
    if is_between and run.evaluated_step < run.step:
        for event in _evaluate(run):
            _judge(run, event.all_metrics)
            run.evaluated_step = run.step
            yield event
        if _is_patience_over(run):
            assert run.best.value is not None
            yield StoppedEarly(run.step, config.stopping.metric, run.best.value, run.best.step)
            yield save_checkpoint(run)
    is_due = run.step % config.checkpoint_every == 0 or run.step == config.num_steps
    if is_due and run.step > max(0, run.saved_step):
        yield save_checkpoint(run)


def _follow(run: Run, result: StepResult) -> Iterator[Event]:
    """Let everything that watches the steps see one that was taken."""
    if run.step > run.bad_steps.last:
        run.bad_steps.num_in_a_row = 0
    if run.average is not None:
        run.average.update()
    if run.dynamic is not None:
        yield from run.dynamic.step()
    if result.damping.reason:
        yield StepDamped(run.step, result.damping.factor, result.damping.reason)
    if run.memory is not None:
        yield from run.memory.report(run.step)


def _find_position(run: Run) -> dict[str, Any]:
    """Return where the next step's batches begin, past the steps that are left out."""
    while (position := run.loader.state_dict()) in run.bad_steps.left_out:
        for _ in range(run.num_micro_batches):
            run.loader.next_batch()
    return position


def _take_one(run: Run) -> StepResult:
    set_learning_rate(run.optimizer, learning_rate_at(run, run.step))
    for module in run.trained_modules:
        run.task.on_step(module, run.step)
    micro_batches = [run.loader.next_batch() for _ in range(run.num_micro_batches)]
    before = _copy_statistics(run) if run.config.on_bad_step == "skip" else {}
    how: dict[str, Any] = {"precision": run.precision, "bound": run.bound, "prediction": run.prediction}
    if run.parallel is None:
        result = take_step(run.task, run.model, run.optimizer, micro_batches, **how)
    else:
        result = take_parallel_step(run.task, run.parallel, run.optimizer, micro_batches, **how)
        run.parallel.average_statistics_()
    if not result.is_taken:
        for buffer, value in before.items():
            buffer.copy_(value)
    run.step += 1
    return result


def _copy_statistics(run: Run) -> dict[Tensor, Tensor]:
    """Copy the buffers that a forward pass may change, such as the statistics of batch normalization.

    Those of int8 are weights, which none changes.
    """
    buffers = [
        tensor
        for module in run.trained_modules
        for tensor in module.state_dict(keep_vars=True).values()
        if not isinstance(tensor, torch.nn.Parameter) and tensor.dtype != torch.int8
    ]
    return {tensor: tensor.clone() for tensor in buffers}


def _answer_bad_step(run: Run, result: StepResult, position: dict[str, Any]) -> tuple[Event, ...]:
    """Do what `on_bad_step` says after a step that was not taken."""
    config, bad_steps = run.config, run.bad_steps
    what, value = ("loss", result.loss) if not math.isfinite(result.loss) else ("gradient norm", result.grad_norm)
    reason = f"the {what} is {value}"
    bad_steps.num_in_a_row += 1
    bad_steps.last = max(bad_steps.last, run.step)
    if config.on_bad_step == "stop" or bad_steps.num_in_a_row >= config.max_bad_steps:
        checkpoint = find_newest(run)
        saved = f"the last checkpoint is {checkpoint.path}" if checkpoint else "there is no checkpoint yet"
        many = f", {bad_steps.num_in_a_row} bad steps in a row" if bad_steps.num_in_a_row > 1 else ""
        raise TrainingError(
            f"{reason} at step {run.step}{many}, in the batch at epoch {position.get('epoch')}, index "
            f"{position.get('index')} of the data; expected a finite number: lower the learning rate, look at the "
            f"batch for extreme values, use precision=fp32, or set on_bad_step to skip or rewind; {saved}"
        )
    if config.on_bad_step == "skip":
        changes = run.dynamic.step(is_skipped=True) if run.dynamic is not None else ()
        return (StepSkipped(run.step, reason, bad_steps.num_in_a_row, position), *changes)
    checkpoint = find_newest(run)
    assert checkpoint is not None  # one was saved before the first step
    bad_step = run.step
    bad_steps.left_out.append(position)
    kept = bad_steps.state_dict()
    restore(run, checkpoint)
    bad_steps.load_state_dict(kept)
    return (RunRewound(bad_step, reason, run.step, position),)


def learning_rate_at(run: Run, step: int) -> float:
    """Return the learning rate of `step`, counted from 0."""
    settings = run.config.optimizer
    return run.peak_learning_rate * schedule_factor(
        settings.used_schedule,
        step,
        num_steps=run.config.num_steps,
        warmup_steps=settings.warmup_steps,
        final_factor=settings.final_factor,
        decay_share=settings.decay_share,
    )


def _describe(run: Run, result: StepResult, units_per_s: float) -> StepDone:
    return StepDone(
        step=run.step,
        loss=result.loss,
        learning_rate=learning_rate_at(run, run.step - 1) * result.damping.factor,
        grad_norm=result.grad_norm,
        num_units=result.num_units,
        units_per_s=units_per_s,
        damping=result.damping.factor,
    )


def _evaluate(run: Run) -> Iterator[Evaluated]:
    """Measure the model as it would be if training ended here; nothing where nothing is held out."""
    if run.data.heldout is None:
        return
    heldout, limit = run.data.heldout, run.config.evaluation_units
    with run.as_model():
        run.task.on_step(run.model, run.step, is_evaluating=True)
        metrics, num_units = run.share(
            lambda: evaluate(run.task, run.model, heldout(), precision=run.precision, max_units=limit)
        )
    yield Evaluated(run.step, metrics.pop(LOSS), metrics, num_units, run.task.unit)


def _judge(run: Run, metrics: dict[str, float]) -> bool:
    """Return whether this evaluation is the best so far, and keep the model if it is to be kept.

    Where no evaluation decides anything, each is the best.
    """
    settings = run.config.stopping
    if not settings.is_used:
        return True
    if settings.metric not in metrics:
        raise ConfigError(
            f"stopping.metric is {settings.metric!r} and the evaluations measure {', '.join(metrics)}; "
            "choose one of them"
        )
    is_best = run.best.observe(run.step, metrics[settings.metric])
    if is_best and settings.keep_best:
        _save_model(run, BEST_FOLDER, metrics)
    return is_best


def _is_patience_over(run: Run) -> bool:
    return 0 < run.config.stopping.patience <= run.best.num_without_better


def _finish(run: Run) -> Iterator[Event]:
    """The final evaluation and the artifact."""
    if run.memory is not None:
        run.memory.write_page()
    metrics: dict[str, float] = {}
    is_best = True
    for event in _evaluate(run):
        yield event
        metrics = event.all_metrics
        is_best = _judge(run, metrics)
    path = Path(run.config.folder) / MODEL_FOLDER
    if is_best or not run.config.stopping.keep_best:
        _save_model(run, MODEL_FOLDER, metrics)
    elif run.is_first:
        with new_folder(path) as temporary:
            shutil.copytree(Path(run.config.folder) / BEST_FOLDER, temporary, dirs_exist_ok=True)
    manifest = run.share(lambda: read_manifest(path))
    yield ModelSaved(str(path), manifest.digest, sum(file.num_bytes for file in manifest.files.values()))


def _save_model(run: Run, name: str, metrics: dict[str, float]) -> None:
    plan = {} if run.parallel is None else {"plan": run.parallel.plan.as_dict()}
    with run.as_model():
        if run.is_first:
            run.task.save(
                run.model,
                run.data,
                Path(run.config.folder) / name,
                metrics=metrics,
                config_digest=run.config.digest,
                parent_digest=None if run.task.start is None else run.task.start.parent_digest,
                data_position=run.loader.state_dict(),
                **plan,
            )
