"""One optimizer step: micro-batches in, one update out.

The loss is the mean over all tokens of the step, not the mean of the micro-batches' means: every micro-batch adds its
summed loss divided by the step's token count, so that N micro-batches give the gradient of the one big batch, whatever
their lengths.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek.core.errors import TrainingError
from deepseek.data.batching import IGNORED_TARGET, Batch
from deepseek.mixed_precision.forward_precision import Precision, autocast
from deepseek.nn.losses import sum_cross_entropy
from deepseek.optim.clipping import clip_gradients_


@dataclass(frozen=True)
class StepResult:
    """Measurements of one step."""

    loss: float
    """Mean in nats per token, before the update."""
    grad_norm: float
    num_tokens: int


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    precision: Precision,
    grad_clip: float | None,
) -> StepResult:
    """Update `model` from `micro_batches`; raises `TrainingError` when the gradient is not finite."""
    num_tokens = sum(batch.num_target_tokens for batch in micro_batches)
    if num_tokens == 0:
        raise TrainingError("a step has no token to predict; check the data for rows that are all padding")
    optimizer.zero_grad(set_to_none=True)
    loss = sum(accumulate_gradients(model, batch, num_tokens, precision=precision) for batch in micro_batches)
    grad_norm = clip_gradients_(model.parameters(), grad_clip)
    optimizer.step()
    return StepResult(float(loss), grad_norm, num_tokens)


def accumulate_gradients(model: nn.Module, batch: Batch, num_tokens: int, *, precision: Precision) -> float:
    """Add the gradient of this batch's share of the step's mean loss; return that share."""
    loss = summed_loss(model, batch, precision=precision) / num_tokens
    loss.backward()
    return loss.item()


def summed_loss(model: nn.Module, batch: Batch, *, precision: Precision) -> Tensor:
    """() sum of the cross-entropy over the batch's targets, in nats."""
    device = next(model.parameters()).device
    with autocast(precision, device):
        logits_BTV = model(batch.tokens_BT.to(device))
    return sum_cross_entropy(logits_BTV, batch.targets_BT.to(device), ignored_target=IGNORED_TARGET)
