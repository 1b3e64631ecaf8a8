"""Held-out data: the mean loss per unit, and the metrics of the task, over data that training never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from deepseek.core.errors import DataError
from deepseek.mixed_precision.forward_precision import Precision
from deepseek.train.own_loop import move
from deepseek.train.steps import run_forward
from deepseek.train.task import LOSS, Task


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, batches: Iterable[Any], *, precision: Precision, max_units: int = 0
) -> tuple[dict[str, float], int]:
    """Return the metrics over `batches`, `heldout_loss` first, and the number of units they were taken over.

    Stops after the batch that reaches `max_units`, unless that is 0. Raises `DataError` where there is no unit.
    """
    was_training = model.training
    device = next(model.parameters()).device
    measured = task.new_metrics()
    losses: list[float] = []
    num_units = 0
    model.eval()
    try:
        for batch in batches:
            moved = move(batch, device)
            outputs = run_forward(task, model, moved, precision=precision)
            losses.append(task.loss(outputs, moved).item())
            num_units += task.count_units(batch)
            if measured is not None:
                measured.update(outputs, moved)
            if max_units and num_units >= max_units:
                break
    finally:
        model.train(was_training)
    if num_units == 0:
        raise DataError(f"the held-out data has no {task.unit} to measure a loss over; hold out more")
    metrics = {LOSS: math.fsum(losses) / num_units}
    return metrics | (measured.compute() if measured is not None else {}), num_units
