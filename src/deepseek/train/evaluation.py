"""The held-out loss: the mean cross-entropy over text that training never saw, in nats per token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from deepseek.data.batching import Batch
from deepseek.mixed_precision.forward_precision import Precision
from deepseek.train.steps import summed_loss


@torch.no_grad()
def measure_loss(
    model: nn.Module, batches: Iterable[Batch], *, precision: Precision, max_tokens: int = 0
) -> tuple[float, int]:
    """Return the mean loss over `batches` and its number of tokens; stop after `max_tokens` unless that is 0."""
    was_training = model.training
    model.eval()
    loss_sum, num_tokens = 0.0, 0
    try:
        for batch in batches:
            loss_sum += summed_loss(model, batch, precision=precision).item()
            num_tokens += batch.num_target_tokens
            if max_tokens and num_tokens >= max_tokens:
                break
    finally:
        model.train(was_training)
    return loss_sum / num_tokens, num_tokens
