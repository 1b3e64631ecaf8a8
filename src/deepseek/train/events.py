"""What a training run says while it goes on; the data room's events come first in the stream.

Units are what a loss is a mean over, as the task says: tokens that are predicted, images, ...; a loss of tokens is in
nats.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.core.events import Event
from deepseek.core.intervals import find_ends


@dataclass(frozen=True)
class RunStarted(Event):
    """Everything is built; steps follow."""

    num_parameters: int
    task: str
    unit: str
    """What losses are a mean over, in the plural: `tokens`, `images`, ..."""
    num_train_units: int
    """Units of one pass over the training data."""
    precision: str
    first_step: int
    """Steps that an earlier process of this run has done; 0 for a new run."""
    num_steps: int
    learning_rate: float
    """Peak of the schedule."""


@dataclass(frozen=True)
class InitLoaded(Event):
    """Training begins with the model that `init` names."""

    summary: str
    """The model and the source of its weights, random ones above all."""
    new_tensors: tuple[str, ...]
    """Tensors of its head that are new, since the weights have none of that size."""
    parent_digest: str | None
    """Digest of what the weights came from; none for random ones."""


@dataclass(frozen=True)
class PlanApplied(Event):
    """Several ranks share the work of the run."""

    plan: str
    """The settings that are not the defaults."""
    num_ranks: int
    num_micro_batches: int
    """Micro-batches of each rank in a step; ranks that differ in `dp` have different ones."""
    micro_batch_rows: int
    """Rows of one of them."""


@dataclass(frozen=True)
class ActivationsCheckpointed(Event):
    """Blocks compute again in the backward pass what they do not keep."""

    policy: str
    """`selective`, `block`, `full`, or `budget` where blocks were chosen by measurement."""
    num_blocks: int
    """Blocks that are recomputed, in part or as a whole."""
    blocks: tuple[str, ...]
    """Their paths below the model."""
    kept_before_bytes: int | None
    """Bytes that autograd kept at once for one micro-batch; measured for a budget only."""
    kept_bytes: int | None
    """The same with the checkpoints."""


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the step's tokens, before the step."""
    learning_rate: float
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    num_units: int
    """Units of this step."""
    units_per_s: float
    """Throughput since the previous `StepDone`."""
    damping: float = 1.0
    """Factor of gradient prediction, which `learning_rate` contains."""


@dataclass(frozen=True)
class StepDamped(Event):
    """A divergence was foreseen, and the learning rate lowered before the step was taken."""

    step: int
    """Steps done, this one included."""
    factor: float
    """On the learning rate of this step."""
    reason: str
    """What was foreseen."""


@dataclass(frozen=True)
class StepSkipped(Event):
    """The loss or the gradient of a step was no number, and the weights stayed as they were."""

    step: int
    """Steps done, this one included."""
    reason: str
    """What was no number."""
    num_in_a_row: int
    """Bad steps since the last good one, this one included."""
    position: dict[str, Any]
    """Where in the data the step's batch began."""


@dataclass(frozen=True)
class RunRewound(Event):
    """The loss or the gradient of a step was no number; the run went back and leaves the step's batch out."""

    step: int
    """The step that was bad."""
    reason: str
    to_step: int
    """Steps done in the checkpoint that the run went back to."""
    position: dict[str, Any]
    """Where in the data the batch begins that is left out."""


@dataclass(frozen=True)
class MemoryMeasured(Event):
    """The memory of one step was recorded, allocation by allocation."""

    step: int
    peak_bytes: int
    """Most bytes of tensors that were alive at once."""
    peak_by_kind: dict[str, int]
    """Those bytes by what they were for."""
    holders: tuple[tuple[str, str, int], ...]
    """Module, kind and bytes of those who held most of them, the largest first."""
    allocator_peak_bytes: int | None
    """Most bytes that torch's allocator had handed out; none on a CPU."""
    page: str
    """File with the whole of it."""


@dataclass(frozen=True)
class MemoryLeakSuspected(Event):
    """Tensors became more from look to look, or every step left some of its own behind."""

    step: int
    since_step: int
    grown_bytes: int
    """Bytes of tensors that Python knows of, now and at `since_step`; others may be held by a graph of autograd."""
    tensors: tuple[str, ...]
    """Types and shapes, and what they do."""
    modules: tuple[str, ...]
    """Modules that allocated them."""


@dataclass(frozen=True)
class EvaluationProgress(Event):
    """A batch of an evaluation of a finished model is measured."""

    num_batches: int
    """Batches done, this one included."""
    total_batches: int
    """Batches in all; 0 where the data do not say."""
    num_units: int
    """Units done."""


@dataclass(frozen=True)
class Evaluated(Event):
    """Measurements on held-out data."""

    step: int
    heldout_loss: float
    """Mean per unit."""
    metrics: dict[str, float]
    """What the task measures besides, by name; without the ends of intervals."""
    num_units: int
    unit: str

    @property
    def all_metrics(self) -> dict[str, float]:
        """The held-out loss and what the task measures besides, by name."""
        return {"heldout_loss": self.heldout_loss} | self.metrics


@dataclass(frozen=True)
class StoppedEarly(Event):
    """The metric has not improved for as many evaluations as `stopping.patience` allows."""

    step: int
    metric: str
    best: float
    best_step: int


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint that a later process can resume from is on disk."""

    step: int
    path: str
    duration_s: float


@dataclass(frozen=True)
class ModelSaved(Event):
    """The finished model is on disk."""

    path: str
    digest: str
    num_bytes: int


TrainEvent = (
    InitLoaded
    | RunStarted
    | PlanApplied
    | ActivationsCheckpointed
    | StepDone
    | StepDamped
    | StepSkipped
    | RunRewound
    | MemoryMeasured
    | MemoryLeakSuspected
    | Evaluated
    | StoppedEarly
    | CheckpointSaved
    | ModelSaved
)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read the events of the run that `record` wrote to `path`, oldest first: those since it last began with step 0.

    A line that a kill or a full disk cut short is left out.
    """
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    starts = [index for index, event in enumerate(events) if event["kind"] == "run_started" and not event["first_step"]]
    return events[starts[-1] if starts else 0 :]


def steps_by_number(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the optimizer steps among `events`, in order; of one that a killed process had done already, the later."""
    steps = {event["step"]: event for event in events if event["kind"] == "step_done"}
    return dict(sorted(steps.items()))


@dataclass(frozen=True)
class RunCurves:
    """What a run has measured, by step."""

    unit: str
    """What losses are a mean over, in the plural."""
    losses: dict[int, float]
    """Mean training loss per unit."""
    heldout_losses: dict[int, float]
    metrics: dict[str, dict[int, float]]
    """What the task measures besides, by name."""


def read_curves(events: list[dict[str, Any]]) -> RunCurves:
    """Read the curves of a run from its events; of steps that were done twice, the later ones."""
    started = [event for event in events if event["kind"] == "run_started"]
    evaluations = {event["step"]: event for event in events if event["kind"] == "evaluated"}
    evaluations = dict(sorted(evaluations.items()))
    names = dict.fromkeys(name for event in evaluations.values() for name in event["metrics"])
    ends = {end for both in find_ends(names).values() for end in both}
    return RunCurves(
        unit=started[-1]["unit"] if started else "units",
        losses={step: event["loss"] for step, event in steps_by_number(events).items()},
        heldout_losses={step: event["heldout_loss"] for step, event in evaluations.items()},
        metrics={
            name: {step: event["metrics"][name] for step, event in evaluations.items() if name in event["metrics"]}
            for name in names
            if name not in ends
        },
    )
