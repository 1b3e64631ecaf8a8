"""One optimizer step: micro-batches in, one update out.

The loss is the mean over all units of the step (tokens, images, ...), not the mean of the micro-batches' means: every
micro-batch adds its summed loss divided by the step's units, so that N micro-batches give the gradient of the one big
batch, however many units each of them has.

A step whose loss or gradient is no number is not taken: weights and moments stay, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek.core.errors import TrainingError
from deepseek.mixed_precision.forward_precision import Precision, autocast
from deepseek.optim.clipping import GradientBound, gradient_norm, scale_gradients_
from deepseek.optim.gradient_prediction import UNDAMPED, Damping, GradientPrediction
from deepseek.optim.optimizers import scale_learning_rate_
from deepseek.train.own_loop import move
from deepseek.train.task import Task

if TYPE_CHECKING:
    from deepseek.train.parallel_run import ParallelRun


@dataclass(frozen=True)
class StepResult:
    """Measurements of one step."""

    loss: float
    """Mean per unit, before the update."""
    grad_norm: float
    """Norm of the whole gradient before it was bounded."""
    num_units: int
    """Units that the loss is a mean over."""
    damping: Damping = UNDAMPED
    """What gradient prediction did to the learning rate."""

    @property
    def is_taken(self) -> bool:
        """Whether the weights were updated: only where loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def take_step(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    *,
    precision: Precision,
    bound: GradientBound,
    prediction: GradientPrediction | None = None,
) -> StepResult:
    """Update `model` from `micro_batches` by a gradient that `bound` keeps small, at a rate that `prediction` damps.

    Raises `TrainingError` where the batches have nothing to learn from.
    """
    num_units = sum(task.count_units(batch) for batch in micro_batches)
    if num_units == 0:
        raise TrainingError(
            f"a step has no {task.unit} to learn from; check the data for rows that are all padding or without a target"
        )
    optimizer.zero_grad(set_to_none=True)
    loss = math.fsum(
        accumulate_gradients(task, model, batch, num_units, precision=precision) for batch in micro_batches
    )
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    result = StepResult(loss, gradient_norm(gradients), num_units)
    return _update(result, optimizer, partial(scale_gradients_, gradients), bound, prediction)


def take_parallel_step(
    task: Task,
    run: ParallelRun,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    *,
    precision: Precision,
    bound: GradientBound,
    prediction: GradientPrediction | None = None,
) -> StepResult:
    """Do what `take_step` does, on all ranks of a plan, of which this one has `micro_batches`.

    Loss and norm are sums over ranks, and all take rank 0's, so that a step which is no number on one rank is taken by
    none.
    """
    optimizer.zero_grad(set_to_none=True)
    learner = run.build_learner(task, precision)
    totals = run.model.accumulate_gradients(learner, [run.move(batch) for batch in micro_batches])
    numbers = torch.tensor([totals.loss, run.model.gradient_norm()], dtype=torch.float64)
    numbers = numbers.to(run.model.mesh.base.device_type)
    dist.broadcast(numbers, 0)
    loss, norm = numbers.tolist()
    result = StepResult(loss, norm, totals.num_units)
    return _update(result, optimizer, run.model.scale_gradients_, bound, prediction)


def _update(
    result: StepResult,
    optimizer: torch.optim.Optimizer,
    scale_: Callable[[float], None],
    bound: GradientBound,
    prediction: GradientPrediction | None,
) -> StepResult:
    """Take the step whose gradients are there, which `scale_` multiplies, unless something is no number."""
    if result.is_taken:
        scale_(bound.factor(result.loss, result.grad_norm))
        if prediction is not None:
            result = replace(result, damping=prediction.observe(result.loss, result.grad_norm))
            scale_learning_rate_(optimizer, result.damping.factor)
        optimizer.step()
    return result


def accumulate_gradients(task: Task, model: nn.Module, batch: Any, num_units: int, *, precision: Precision) -> float:
    """Add the gradient of this batch's share of the step's mean loss; return that share."""
    loss = summed_loss(task, model, batch, precision=precision) / num_units
    loss.backward()
    return loss.item()


def summed_loss(task: Task, model: nn.Module, batch: Any, *, precision: Precision) -> Tensor:
    """() sum of the loss over the units of `batch`."""
    device = next(model.parameters()).device
    batch = move(batch, device)
    with autocast(precision, device):
        loss = task.loss_without_outputs(model, batch)
    if loss is not None:
        return loss
    return task.loss(run_forward(task, model, batch, precision=precision), batch)


def run_forward(task: Task, model: nn.Module, batch: Any, *, precision: Precision) -> Any:
    """Run the task's forward pass in `precision`, on a batch that is on the model's device."""
    with autocast(precision, next(model.parameters()).device):
        return task.forward(model, batch)
