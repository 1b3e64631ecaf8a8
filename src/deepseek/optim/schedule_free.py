"""Schedule-free AdamW (Defazio et al. 2024), from the authors' library: no schedule, and no length to know in advance.

Gradients are taken at points between a fast iterate and the average of its path, and the average is the model. So the
parameters have two values: those that learn, and those the model would be saved with. `averaged` shows the second for
an evaluation or for saving, and puts the first back bit by bit; checkpoints keep the first, with everything the next
step depends on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deepseek.core.extras import require


def build_schedule_free(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Build the optimizer over `groups`, ready for its first step; raises `MissingExtraError` without the library."""
    optimizer: torch.optim.Optimizer = require("schedulefree", extra="train").AdamWScheduleFree(
        groups, lr=learning_rate, betas=betas, eps=eps
    )
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The parameters of `optimizer` are the model's while the block runs; nothing happens for one of another kind."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):  # some may be pieces, of which no list is made
                parameter.copy_(value)  # computing it back would round
