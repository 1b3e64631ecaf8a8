"""`torch.cond` and `while_loop` with gradients that are right.

Measured on torch 2.13, each with a test: the backward of `while_loop` makes one iteration even where forward made
none, so that each iteration is itself a condition (`loops`), and drops what flows through a variable that needed no
gradient at first, so that the first iteration is made before the loop (`all_require_grad`). The backward of
`torch.cond` miscounts where a result is a whole number (`_pack`), wants both branches' gradients in one memory layout
(`steady`), and takes no two views of one tensor, neither as inputs (`unalias`) nor as gradients (`_unpack`). A
multiplication by one changes no number, and a compiling backend removes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from deepseek.compiler.jit.tracing.merging import Leaf


def choose(condition: Tensor, then: Any, other: Any, leaves: list[Leaf]) -> list[Tensor]:
    """`torch.cond` on branches that give lists of tensors.

    In training, whole numbers leave the branches as the same bits under a floating type: the backward of `torch.cond`
    in torch 2.13 miscounts gradients where an output has none.
    """
    if not torch.is_grad_enabled():
        return list(_cond(condition, lambda: tuple(then()), lambda: tuple(other())))
    packed = _cond(
        condition,
        lambda: tuple(_pack(value) for value in then()),
        lambda: tuple(_pack(value) for value in other()),
    )
    return [_unpack(packed[index], leaves[index].dtype, len(leaves)) for index in range(len(leaves))]


def _cond(condition: Tensor, then: Any, other: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return torch.cond(condition, then, other, ())
    with _quiet():
        return torch.cond(condition, then, other, ())


def loop(going_on: Any, iterate: Any, start: tuple[Tensor, ...]) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return while_loop(going_on, iterate, start)
    with _quiet():
        return while_loop(going_on, iterate, start)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that torch gives about itself when `torch.export` meets control flow in training."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


def _pack(value: Tensor) -> Tensor:
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return value
    if value.dtype == torch.bool:
        return value.to(torch.float32)
    return value.to(torch.int64).view(torch.float64).clone()


def _unpack(value: Tensor, dtype: torch.dtype, num_leaves: int) -> Tensor:
    """Return a branch's result again; of several, each is multiplied by one, so that no two gradients coming back are
    one."""
    if dtype.is_floating_point or dtype.is_complex:
        return value * 1 if num_leaves > 1 else value
    if dtype == torch.bool:
        return value.detach() != 0
    return value.detach().view(torch.int64).to(dtype)


def steady(values: Any) -> list[Any]:
    """Return the values with tensors whose gradients come back dense.

    The branches of a backward `torch.cond` must agree in memory layout, and the gradient of a sum has strides of zero
    where that of an unused input has not. A multiplication by one changes no number and makes a dense gradient.
    """
    if not torch.is_grad_enabled():
        return list(values)
    return [value * 1 if isinstance(value, Tensor) and _may_require_grad(value) else value for value in values]


def unalias(value: Any) -> Any:
    """Return a value that shares memory with no other: `torch.cond` takes no two views of one tensor in training."""
    is_view = isinstance(value, Tensor) and torch.is_grad_enabled() and value._base is not None
    return value.clone() if is_view else value


def _may_require_grad(value: Tensor) -> bool:
    """Return whether gradients may flow into it; an exported graph may later be given other inputs than it was traced
    with."""
    return value.is_floating_point() and (value.requires_grad or torch.compiler.is_exporting())


def all_require_grad(leaves: tuple[Tensor, ...]) -> bool:
    """Return whether every variable of a loop is known to carry gradients before its first iteration.

    The backward of `while_loop` in torch 2.13 drops the gradients that flow through a variable whose first value needs
    none, such as a sum that starts at zero; after one iteration as a condition, every variable needs them.
    """
    return not torch.compiler.is_exporting() and all(leaf.requires_grad for leaf in leaves if leaf.is_floating_point())


def copy_all(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(leaf.clone() for leaf in leaves)
