"""Keeping one bad batch from undoing many good ones: the norm of the whole gradient is bounded before each step.

Source: Pascanu et al. 2013. The norm is torch's; what is added is that a gradient which is no longer a number stops
the run with a sentence instead of turning every weight into NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deepseek.core.errors import TrainingError


def clip_gradients_(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Scale gradients in place so that their joint norm is at most `max_norm`; return the norm before that.

    `None` only measures. Raises `TrainingError` when the norm is not finite; the gradients are then left as they are.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        raise TrainingError(
            f"the gradient norm is {norm.item()}; expected a finite number: lower the learning rate, "
            "check the batch for extreme values, or use precision 'fp32'"
        )
    if max_norm is not None and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm.item()
