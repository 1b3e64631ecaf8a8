"""Indices that are whole numbers in tensors: what `x[i]` and `x[i, :]` mean while `i` is not known yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.jit.tracing.merging import is_traced


def is_index(value: Tensor) -> bool:
    """Whether it is one whole number."""
    return value.dim() == 0 and not value.is_floating_point() and value.dtype != torch.bool


def is_plain_index(index: tuple[Any, ...]) -> bool:
    """Whether it consists of whole numbers and full slices, and one of the numbers is a traced tensor."""
    if not any(is_traced(each) for each in index):
        return False
    for each in index:
        is_whole = isinstance(each, slice) and each.start is None and each.stop is None and each.step is None
        is_one = (is_traced(each) and is_index(each)) or (isinstance(each, int) and not isinstance(each, bool))
        if not is_whole and not is_one:
            return False
    return True


def as_indices(value: Tensor, index: tuple[Any, ...]) -> list[Tensor | None]:
    indices: list[Tensor | None] = []
    for each in index:
        if isinstance(each, slice):
            indices.append(None)
        elif isinstance(each, Tensor):
            indices.append(each)
        else:
            indices.append(torch.full((), each, dtype=torch.int64, device=value.device))
    return indices
