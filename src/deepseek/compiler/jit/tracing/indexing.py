"""Indices that are whole numbers in tensors: what `x[i]` and `x[i, :]` mean while `i` is not known yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.jit.tracing.merging import is_traced


def is_index(value: Tensor) -> bool:
    """Return whether it is one whole number."""
    return value.dim() == 0 and not value.is_floating_point() and value.dtype != torch.bool


def is_plain_index(index: tuple[Any, ...]) -> bool:
    """Return whether it consists of whole numbers and full slices, and one of the numbers is a traced tensor."""
    if not any(is_traced(part) for part in index):
        return False
    for part in index:
        is_whole = isinstance(part, slice) and part.start is None and part.stop is None and part.step is None
        is_one = (is_traced(part) and is_index(part)) or (isinstance(part, int) and not isinstance(part, bool))
        if not is_whole and not is_one:
            return False
    return True


def as_indices(value: Tensor, index: tuple[Any, ...]) -> list[Tensor | None]:
    indices: list[Tensor | None] = []
    for part in index:
        if isinstance(part, slice):
            indices.append(None)
        elif isinstance(part, Tensor):
            indices.append(part)
        else:
            indices.append(torch.full((), part, dtype=torch.int64, device=value.device))
    return indices
