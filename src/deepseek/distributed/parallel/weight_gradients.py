"""The backward pass in two: gradients of inputs at once, gradients of weights when a zero-bubble schedule says so.

    backward    gradient of the output -> gradient of the input; each linear layer notes its input and that gradient
    weight      what was noted -> gradients of weights and biases

`split_backward_` lets the linear layers of a module do so while `deferring()` holds. The matmuls are those of a whole
backward pass, only later, so the sums are the same. In between, the inputs of linear layers and the gradients of their
outputs are kept, and the rest of the graph is freed; blocks that are recomputed are recomputed once. Parameters that
belong to no linear layer (embeddings, norms, stacked experts), or to one whose input needs no gradient, get theirs in
the first pass.

Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

Deferred = dict[Tensor, list[Callable[[], Tensor]]]
"""Parameters with the parts of their gradients that are still to be computed."""


class WeightGradients:
    """Notes what the weight gradients of a module's linear layers will be computed from."""

    def __init__(self) -> None:
        self.is_deferring = False
        self._noted: Deferred = {}

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Let passes inside leave weight gradients for later; outside, they are computed as ever."""
        self.is_deferring = True
        self._noted = {}  # of a step that failed
        try:
            yield
        finally:
            self.is_deferring = False

    def note(self, layer: nn.Linear, x: Tensor, gradient: Tensor) -> None:
        """Note the input of a linear layer and the gradient of its output."""
        x = x.detach()
        self._noted.setdefault(layer.weight, []).append(lambda: _as_rows(gradient).mT @ _as_rows(x).to(gradient.dtype))
        if layer.bias is not None and layer.bias.requires_grad:
            self._noted.setdefault(layer.bias, []).append(lambda: _as_rows(gradient).sum(0))

    def take(self) -> Deferred:
        """Return what was noted since the last call."""
        noted, self._noted = self._noted, {}
        return noted


def split_backward_(module: nn.Module) -> WeightGradients:
    """Let the linear layers of `module` leave their weight gradients for later, in place.

    >>> layer = nn.Linear(2, 1)
    >>> gradients = split_backward_(layer)
    >>> with gradients.deferring():
    ...     layer(torch.ones(3, 2, requires_grad=True)).sum().backward()
    >>> layer.weight.grad is None
    True
    >>> accumulate_(gradients.take())
    >>> layer.weight.grad
    tensor([[3., 3.]])
    """
    gradients = WeightGradients()
    for layer in module.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer):  # others compute something else
            layer.forward = partial(_run_linear, layer, gradients)  # type: ignore[method-assign]
    return gradients


def accumulate_(deferred: Deferred) -> None:
    """Compute the gradients of deferred parameters, and add them to what the parameters have.

    Hooks on a parameter run once, after all parts of its gradient.
    """
    for parameter, parts in deferred.items():
        gradient = parts[0]()
        for part in parts[1:]:
            gradient = gradient + part()
        torch.autograd.backward([parameter], [gradient.to(parameter.dtype)])


def _run_linear(layer: nn.Linear, gradients: WeightGradients, x: Tensor) -> Tensor:
    has_two_halves = x.requires_grad and layer.weight.requires_grad and torch.is_grad_enabled()
    if not (gradients.is_deferring and has_two_halves):
        return F.linear(x, layer.weight, layer.bias)
    # Detached, since autograd would run the hooks of parameters whose gradient is not there yet.
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    return cast("Tensor", _SplitLinear.apply(x, weight, bias, partial(gradients.note, layer)))  # type: ignore[no-untyped-call]


class _SplitLinear(torch.autograd.Function):
    """A linear layer whose backward pass computes the gradient of its input only, and notes the rest."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, note: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        cast("Any", ctx).note = note
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.note(x, gradient)
        return gradient @ weight.to(gradient.dtype), None, None, None


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
