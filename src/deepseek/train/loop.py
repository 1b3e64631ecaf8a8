"""The training loop: a generator of events from a config to a finished model.

    for event in train(config):
        print(event)

    text -> tokenizer, token caches -> model, optimizer, loader -> [step, ..., evaluation, checkpoint] -> artifact

Whoever iterates decides when it stops: closing the generator (or leaving the `for` with Ctrl-C) between two steps saves
a checkpoint first, so that the next `train(config)` goes on with the next step. A process that is killed goes on from
its last periodic checkpoint. Either way the weights become bit-equal to those of a run that was never stopped, since
everything a step depends on is in the checkpoint or a pure function of the step's number.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek.artifact.reading import RUN_MODEL_NAME
from deepseek.checkpoint.activation_budget import checkpoint_within_budget_
from deepseek.checkpoint.activations import checkpoint_blocks_
from deepseek.checkpoint.restoring import newest_valid
from deepseek.checkpoint.rng_state import capture_rng, restore_rng
from deepseek.checkpoint.saving import save
from deepseek.core.caller_warnings import warn_caller
from deepseek.core.config import Config
from deepseek.core.errors import CheckpointError, ConfigError
from deepseek.core.events import Event
from deepseek.core.folder_lock import locked_folder
from deepseek.data.batching import BatchLoader, evaluation_batches
from deepseek.data.corpus import PreparedData, load_data, prepare_data
from deepseek.mixed_precision.amp_levels import choose_level
from deepseek.mixed_precision.dynamic import DynamicPrecision
from deepseek.mixed_precision.forward_precision import Precision, autocast, choose_precision
from deepseek.models.decoder.model import Decoder, count_parameters
from deepseek.models.loading import save_model
from deepseek.optim.learning_rates import scale_learning_rate, schedule_factor
from deepseek.optim.optimizers import build_optimizer, set_learning_rate
from deepseek.train.config import TrainConfig
from deepseek.train.evaluation import measure_loss
from deepseek.train.events import ActivationsCheckpointed, CheckpointSaved, Evaluated, ModelSaved, RunStarted, StepDone
from deepseek.train.steps import StepResult, take_step

DATA_FOLDER, CHECKPOINT_FOLDER, MODEL_FOLDER = "data", "checkpoints", RUN_MODEL_NAME
# Settings that a resumed run may change without becoming another run.
_FREE_SETTINGS = (
    "ds_activation_checkpoint",
    "folder",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "evaluate_every",
    "evaluation_tokens",
)


@dataclass(eq=False)
class Run:
    """Everything that lives while a run goes on."""

    config: TrainConfig
    data: PreparedData
    model: Decoder
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    precision: Precision
    peak_learning_rate: float
    dynamic: DynamicPrecision | None = None
    """Chooses the precision of each layer, where that is asked for; `precision` then puts nothing around the model."""
    checkpointed: ActivationsCheckpointed | None = None
    """Which blocks are recomputed in the backward pass, if any."""
    step: int = 0
    """Optimizer steps done."""
    saved_step: int = 0
    """Steps done when the newest checkpoint was saved."""


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


def train(config: TrainConfig) -> RunEvents:
    """Train from `config`, or go on with it where an earlier call was stopped; the model is in `folder/model`.

    Raises `ConfigError`, `DataError`, `TrainingError`, `CheckpointError` or `StorageError`, the last where another run
    is at work in the folder as well.
    """
    return RunEvents(_train(config))


def _train(config: TrainConfig) -> Generator[Event, None, None]:
    open_device(config.device)
    with locked_folder(Path(config.folder)):
        yield from train_in_locked_folder(config)


def train_in_locked_folder(config: TrainConfig) -> Generator[Event, None, None]:
    """Train as `train` does, for a caller who holds the folder's lock for longer."""
    open_device(config.device)
    folder = Path(config.folder)
    yield from prepare_data(config.data, folder / DATA_FOLDER)
    run = build(config, load_data(config.data, folder / DATA_FOLDER, is_verified=True))
    resume(run)
    yield RunStarted(
        num_parameters=count_parameters(run.model),
        num_train_tokens=len(run.data.train.tokens),
        precision=run.precision if run.dynamic is None else "dynamic",
        first_step=run.step,
        num_steps=config.num_steps,
        learning_rate=run.peak_learning_rate,
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


def build(config: TrainConfig, data: PreparedData) -> Run:
    """Model, optimizer and loader of a new run."""
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {data.tokenizer.vocab_size} tokens and model.vocab_size is {config.model.vocab_size}; "
            "make model.vocab_size at least as large"
        )
    device = open_device(config.device)
    _seed(config.seed)
    model = Decoder(config.model).to(device).train()
    learning_rate = scale_learning_rate(
        config.sequences_per_step,
        base=config.optimizer.base_learning_rate,
        reference_batch_size=config.optimizer.reference_batch_size,
    )
    optimizer = build_optimizer(model, config.optimizer, learning_rate)
    checkpointed = checkpoint_activations_(model, config, device)
    if config.compile == "blocks":
        for layer in model.layers:
            layer.compile()
    loader = BatchLoader(data.train, config.data)
    precision, dynamic = open_precision(config, model, device)
    return Run(config, data, model, optimizer, loader, precision, learning_rate, dynamic, checkpointed)


def checkpoint_activations_(
    model: Decoder, config: TrainConfig, device: torch.device
) -> ActivationsCheckpointed | None:
    """Checkpoint the layers of `model` as `ds_activation_checkpoint` says; `None` where it says nothing.

    A budget is measured on one micro-batch of zeros: which bytes are kept does not depend on what the tokens are. Which
    blocks are chosen does not change what is learned, so that a resumed run may choose others.
    """
    wanted = config.ds_activation_checkpoint
    layers = [f"layers.{index}" for index in range(len(model.layers))]
    if wanted == "none":
        return None
    if not isinstance(wanted, float):
        checkpoint_blocks_(model, wanted, blocks=layers)
        return ActivationsCheckpointed(wanted, len(layers), tuple(layers), None, None)
    is_packed = config.data.batching == "packed"
    num_tokens = config.data.sequence_length if is_packed else config.data.max_len
    num_rows = config.data.batch_size if is_packed else max(1, config.data.max_tokens // config.data.max_len)
    tokens = torch.zeros(num_rows, num_tokens, dtype=torch.long, device=device)
    is_wide = choose_level(config.ds_amp_level) == "O0"
    # The dynamic precision keeps activations in bf16 as well.
    precision: Precision = "fp32" if is_wide else "bf16" if config.precision == "dynamic" else config.precision
    with autocast(precision, device):
        plan = checkpoint_within_budget_(model, (tokens,), memory_budget=wanted, blocks=layers)
    chosen = plan.choice.recomputed
    return ActivationsCheckpointed(
        "budget", len(chosen), chosen, kept_before_bytes=plan.kept_before_bytes, kept_bytes=plan.choice.peak_bytes
    )


def open_precision(
    config: TrainConfig, model: Decoder, device: torch.device
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
    """Take up the newest valid checkpoint of the run's folder, if there is one."""
    checkpoint = newest_valid(Path(run.config.folder) / CHECKPOINT_FOLDER)
    if checkpoint is None:
        return
    state = checkpoint.state
    before, now = state.get("settings", {}), deciding_settings(run.config)
    now = {name: value for name, value in now.items() if name in before or not is_default(run.config, name)}
    if changed := find_changes(before, now):
        raise CheckpointError(
            f"{checkpoint.path} belongs to a run with other settings ({', '.join(changed[:3])}); "
            "go on with the settings it was started with, or choose another folder"
        )
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.loader.load_state_dict(state["loader"])
    if run.dynamic is not None:
        run.dynamic.load_state_dict(state["precision"])
    if run.config.precision == "auto" and choose_level(run.config.ds_amp_level) == "O1":
        # The process that began has measured, maybe on another machine; one run computes in one precision.
        run.precision = state.get("forward_precision", run.precision)
    restore_rng(state["rng"])
    run.step = run.saved_step = checkpoint.step


def deciding_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide the weights, by dotted name; runs that share them may share checkpoints."""
    return dict(_flatten({name: value for name, value in config.to_dict().items() if name not in _FREE_SETTINGS}))


def is_default(config: Config, name: str) -> bool:
    """Return whether the setting of this dotted name has its default value.

    A setting that a checkpoint does not know is newer than the checkpoint, which was written under its default.
    """
    *parents, last = name.split(".")
    for parent in parents:
        config = getattr(config, parent)
    field = type(config).model_fields.get(last)
    return field is not None and field.get_default(call_default_factory=True) == getattr(config, last)


def find_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the differences between two flat settings, one phrase for each.

    >>> find_changes({"num_steps": 650, "seed": 0}, {"num_steps": 700, "seed": 0})
    ['num_steps was 650 and is 700']
    """
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def save_checkpoint(run: Run) -> CheckpointSaved:
    """Write everything the next step depends on."""
    began_s = time.perf_counter()
    state: dict[str, Any] = {
        "settings": deciding_settings(run.config),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "loader": run.loader.state_dict(),
        "rng": capture_rng(),
        "forward_precision": run.precision,
    }
    if run.dynamic is not None:
        state["precision"] = run.dynamic.state_dict()
    path = save(Path(run.config.folder) / CHECKPOINT_FOLDER, run.step, state, keep=run.config.keep_checkpoints)
    run.saved_step = run.step
    return CheckpointSaved(run.step, str(path), time.perf_counter() - began_s)


def _take_steps(run: Run) -> Iterator[Event]:
    config = run.config
    num_tokens, began_s = 0, time.perf_counter()
    while run.step < config.num_steps:
        result = _take_one(run)
        if run.dynamic is not None:
            yield from run.dynamic.step()
        num_tokens += result.num_tokens
        if run.step % config.log_every == 0 or run.step in (1, config.num_steps):
            now_s = time.perf_counter()
            yield _describe(run, result, num_tokens / (now_s - began_s))
            num_tokens, began_s = 0, now_s
        if config.evaluate_every and run.step % config.evaluate_every == 0 and run.step < config.num_steps:
            yield from _evaluate(run)
        if run.step % config.checkpoint_every == 0 or run.step == config.num_steps:
            yield save_checkpoint(run)


def _take_one(run: Run) -> StepResult:
    set_learning_rate(run.optimizer, learning_rate_at(run, run.step))
    run.model.set_step(run.step)
    micro_batches = [run.loader.next_batch() for _ in range(run.config.accum_steps)]
    result = take_step(
        run.model,
        run.optimizer,
        micro_batches,
        precision=run.precision,
        grad_clip=run.config.optimizer.grad_clip,
    )
    run.step += 1
    return result


def learning_rate_at(run: Run, step: int) -> float:
    """Return the learning rate of `step`, counted from 0."""
    settings = run.config.optimizer
    return run.peak_learning_rate * schedule_factor(
        settings.schedule,
        step,
        num_steps=run.config.num_steps,
        warmup_steps=settings.warmup_steps,
        final_factor=settings.final_factor,
        decay_share=settings.decay_share,
    )


def _describe(run: Run, result: StepResult, tokens_per_s: float) -> StepDone:
    return StepDone(
        step=run.step,
        loss=result.loss,
        learning_rate=learning_rate_at(run, run.step - 1),
        grad_norm=result.grad_norm,
        num_tokens=result.num_tokens,
        tokens_per_s=tokens_per_s,
    )


def _evaluate(run: Run) -> Iterator[Evaluated]:
    """The held-out loss as it would be if training ended here; nothing where no text is held out."""
    if run.data.heldout is None:
        return
    mask = run.config.model.mask
    # As it will be loaded: with the mask wholly in force, however few of its opening steps are done.
    run.model.set_step(max(run.step, mask.opening_steps if mask else 0))
    batches = evaluation_batches(run.data.heldout, run.config.data)
    limit = run.config.evaluation_tokens
    loss, num_tokens = measure_loss(run.model, batches, precision=run.precision, max_tokens=limit)
    yield Evaluated(run.step, loss, num_tokens)


def _finish(run: Run) -> Iterator[Event]:
    """The final held-out loss and the artifact."""
    metrics: dict[str, float] = {}
    for event in _evaluate(run):
        metrics = {"heldout_loss": event.heldout_loss}
        yield event
    path = Path(run.config.folder) / MODEL_FOLDER
    manifest = save_model(
        run.model,
        path,
        tokenizer=run.data.tokenizer,
        metrics=metrics,
        config_digest=run.config.digest,
        data_position=run.loader.state_dict(),
        overwrite=True,
    )
    yield ModelSaved(str(path), manifest.digest, sum(file.num_bytes for file in manifest.files.values()))
