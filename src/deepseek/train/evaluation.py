"""Held-out data: the mean loss per unit, and the metrics of the task, over data that training never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepseek.core.errors import DataError
from deepseek.mixed_precision.forward_precision import Precision
from deepseek.train.own_loop import move
from deepseek.train.steps import run_forward
from deepseek.train.task import LOSS, Task


@dataclass(frozen=True)
class BatchMeasurements:
    """Measurements over some batches."""

    losses: list[float]
    """Sum of the loss over each batch."""
    units: list[int]
    """Units of each batch."""
    metrics: dict[str, float]
    """The mean loss per unit, and what the task measures."""


def evaluate(
    task: Task, model: nn.Module, batches: Iterable[Any], *, precision: Precision, max_units: int = 0
) -> tuple[dict[str, float], int]:
    """Return the metrics over `batches`, `heldout_loss` first, and the number of units they were taken over."""
    measured = measure(task, model, batches, precision=precision, max_units=max_units)
    return measured.metrics, sum(measured.units)


@torch.no_grad()
def measure(
    task: Task, model: nn.Module, batches: Iterable[Any], *, precision: Precision, max_units: int = 0
) -> BatchMeasurements:
    """Measure `model` on `batches`.

    Stops after the batch that reaches `max_units`, unless that is 0. Raises `DataError` where there is no unit.
    """
    was_training = model.training
    device = next(model.parameters()).device
    measured = task.new_metrics()
    losses: list[float] = []
    units: list[int] = []
    model.eval()
    try:
        for batch in batches:
            moved = move(batch, device)
            outputs = run_forward(task, model, moved, precision=precision)
            losses.append(task.loss(outputs, moved).item())
            units.append(task.count_units(batch))
            if measured is not None:
                measured.update(outputs, moved)
            if max_units and sum(units) >= max_units:
                break
    finally:
        model.train(was_training)
    if sum(units) == 0:
        raise DataError(f"the held-out data has no {task.unit} to measure a loss over; hold out more")
    metrics = {LOSS: math.fsum(losses) / sum(units)}
    return BatchMeasurements(losses, units, metrics | (measured.compute() if measured is not None else {}))
