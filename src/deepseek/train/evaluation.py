"""Held-out data: the mean loss per unit, and the metrics of the task, over data that training never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import nn

from deepseek.core.errors import DataError
from deepseek.core.events import Event
from deepseek.mixed_precision.forward_precision import Precision
from deepseek.train.events import EvaluationProgress
from deepseek.train.own_loop import move
from deepseek.train.scores import LEAST_RESAMPLED
from deepseek.train.steps import run_forward
from deepseek.train.task import LOSS, Task, UnitLosses


@dataclass(frozen=True)
class BatchMeasurements:
    """Measurements over some batches."""

    num_units: int
    metrics: dict[str, float]
    """The mean loss per unit, and what the task measures."""
    losses: LossGroups
    """The loss in groups that do not depend on each other."""


@dataclass
class LossGroups:
    """Sums of the loss over groups of units: batches, and the sources that units come from where the task says."""

    batches: list[tuple[float, int]] = field(default_factory=list)
    """Sum and number of units of each batch."""
    sources: dict[int, tuple[float, int]] = field(default_factory=dict)
    """The same of each source; units without one are sources of their own."""

    def add(self, loss: float, num_units: int, units: UnitLosses | None) -> None:
        """Take in the loss of one batch."""
        self.batches.append((loss, num_units))
        if units is None:
            return
        losses_N = units.losses_N.double().cpu().numpy()
        begin = len(self.sources)
        numbers_N = (
            np.arange(begin, begin + len(losses_N)) if units.sources_N is None else units.sources_N.cpu().numpy()
        )
        found, inverse_N = np.unique(numbers_N, return_inverse=True)
        sums, counts = np.bincount(inverse_N, losses_N), np.bincount(inverse_N)
        for number, total, count in zip(found.tolist(), sums.tolist(), counts.tolist(), strict=True):
            before, num_before = self.sources.get(number, (0.0, 0))
            self.sources[number] = before + total, num_before + count

    @property
    def largest(self) -> list[tuple[float, int]]:
        """The groups that an interval comes from: sources where there are enough of them, else batches."""
        return list(self.sources.values()) if len(self.sources) >= LEAST_RESAMPLED else self.batches


def evaluate(
    task: Task, model: nn.Module, batches: Iterable[Any], *, precision: Precision, max_units: int = 0
) -> tuple[dict[str, float], int]:
    """Return the metrics over `batches`, `heldout_loss` first, and the number of units they were taken over."""
    measured = measure(task, model, batches, precision=precision, max_units=max_units)
    return measured.metrics, measured.num_units


@torch.no_grad()
def measure(
    task: Task,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    precision: Precision,
    max_units: int = 0,
    by_unit: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> BatchMeasurements:
    """Measure `model` on `batches`; `by_unit` keeps the loss unit by unit where the task can, and `on_event` hears of
    every batch.

    Stops after the batch that reaches `max_units`, unless that is 0. Raises `DataError` where there is no unit.
    """
    was_training = model.training
    device = next(model.parameters()).device
    measured = task.new_metrics()
    losses, num_units = LossGroups(), 0
    model.eval()
    try:
        for number, batch in enumerate(batches, start=1):
            moved = move(batch, device)
            outputs = run_forward(task, model, moved, precision=precision)
            num_here = task.count_units(batch)
            units = task.unit_losses(outputs, moved) if by_unit else None
            losses.add(task.loss(outputs, moved).item(), num_here, units)
            num_units += num_here
            if measured is not None:
                measured.update(outputs, moved)
            if on_event is not None:
                on_event(EvaluationProgress(number, length_hint(batches), num_units))
            if max_units and num_units >= max_units:
                break
    finally:
        model.train(was_training)
    if num_units == 0:
        raise DataError(f"the held-out data has no {task.unit} to measure a loss over; hold out more")
    metrics = {LOSS: math.fsum(loss for loss, _ in losses.batches) / num_units}
    return BatchMeasurements(num_units, metrics | (measured.compute() if measured is not None else {}), losses)
