"""All of `torch.nn.utils`, and beside it clipping for models that lie in pieces.

torch's `clip_grad_norm_` fails where DTensors of several meshes meet, and knows nothing of pipeline stages. The norm
here is summed over exactly the axes over which each gradient is cut, so that what several ranks hold alike counts once.
"""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    groups: Sequence[dist.ProcessGroup] = (),
) -> Tensor:
    """Scale gradients in place so that their joint norm is at most `max_norm`; return the norm before that.

    Plain tensors and DTensors of any meshes may be mixed. `groups` are process groups whose ranks hold different
    parameters, pipeline stages say; every rank of them calls this. Raises `RuntimeError` for a norm that is no number
    if `error_if_nonfinite`, as torch does.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_(weight, 1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [_whole_sums(parameter.grad) for parameter in listed if parameter.grad is not None]
    total = _measure(gradients, float(norm_type), groups)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {total.item()}; expected a finite number"
        )
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient in gradients:
        local = _as_local(gradient)
        local.mul_(factor.to(local))
    return total


def _measure(gradients: Sequence[Tensor], order: float, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Return the joint norm: powers are summed over each gradient's own axes (or compared, for the infinite order)."""
    is_max = math.isinf(order)
    operation = dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM
    by_axes: defaultdict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        norm = torch.linalg.vector_norm(_as_local(gradient), order)
        by_axes[_find_groups(gradient)].append(norm if is_max else norm**order)
    device = gradients[0].device if gradients else torch.device("cpu")
    dtype = gradients[0].dtype if gradients else torch.float32
    total = torch.zeros((), dtype=dtype, device=device)
    for axes, powers in by_axes.items():
        stacked = torch.stack([power.to(total) for power in powers])
        part = stacked.max() if is_max else stacked.sum()
        for group in axes:
            dist.all_reduce(part, op=operation, group=group)
        total = torch.maximum(total, part) if is_max else total + part
    for group in groups:
        dist.all_reduce(total, op=operation, group=group)
    return total if is_max else total ** (1.0 / order)


def _whole_sums(gradient: Tensor) -> Tensor:
    """Return a gradient without parts of sums, whose norm would mean nothing."""
    if isinstance(gradient, DTensor) and any(isinstance(placement, Partial) for placement in gradient.placements):
        kept = [Replicate() if isinstance(placement, Partial) else placement for placement in gradient.placements]
        return gradient.redistribute(placements=kept)
    return gradient


def _find_groups(gradient: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the groups over which ranks hold different pieces of a gradient."""
    if not isinstance(gradient, DTensor):
        return ()
    return tuple(
        gradient.device_mesh.get_group(index)
        for index, placement in enumerate(gradient.placements)
        if not isinstance(placement, Replicate)
    )


def _as_local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("torch.nn.utils"), name)
