"""All of `torch.nn.functional`, and beside it `fast_sigmoid`: a sigmoid that keeps one byte per element for backward.

torch's own sigmoid is one fused kernel, so a cheaper *formula* made of several kernels is slower in eager mode, however
few operations it has. Measured on one Zen 4 core, a million float32 values, milliseconds forward / backward:

    form      max error   bytes kept   eager, gradients on   eager, gradients off   compiled
    exact     0           4            0.22 / 0.13           0.22                   0.25
    hard      0.0692      1            0.23 / 0.15           0.09                   0.23
    table     7.5e-5      1            4.2  / 1.8            4.2                    1.3

So `hard` is 2.4 times cheaper where nothing is differentiated, and where something is, it costs the same time and a
quarter of the memory. `table` is for accuracy and memory at the cost of time. Not kept, because they won nowhere: a
rational form (error 4.6e-5; 1.7 ms eager, 0.23 compiled) and softsign (error 0.082, eager slower than exact).

Gradients are exact for the form that ran: both are piecewise linear, and what is kept says which piece each value is
on. What the two round in computing the value is not differentiated, as in every floating-point function.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Form = Literal["auto", "exact", "hard", "table"]

# Largest |form(x) - sigmoid(x)| over all x.
MAX_ERRORS = {"hard": 0.0693, "table": 7.6e-5, "exact": 0.0}

# Beyond +-3 the hard form is flat; the table has equal pieces out to +-10 and one flat piece on either side.
_HARD_LIMIT = 3.0
_TABLE_LIMIT, _NUM_PIECES = 10.0, 254


def fast_sigmoid(x: Tensor, *, form: Form = "auto", max_error: float = 0.07) -> Tensor:
    """Compute a sigmoid of `x`, elementwise, within `max_error` of the true one; any shape, any floating dtype.

    `auto` takes the hard form where `max_error` allows it and torch's own sigmoid otherwise. `hard` is
    `clamp(x / 6 + 1/2, 0, 1)`; `table` interpolates linearly between 255 points. Errors are those of float32; a 16-bit
    `x` adds the rounding of its own dtype. Raises `ConfigError` for an unknown form, and for one beyond `max_error`.

    >>> x = torch.tensor([-4.0, 0.0, 1.5], requires_grad=True)
    >>> fast_sigmoid(x)
    tensor([0.0000, 0.5000, 0.7500], grad_fn=<HardSigmoidBackward>)
    """
    chosen = _choose_form(form, max_error)
    if not x.is_floating_point():
        raise ConfigError(f"fast_sigmoid was given {x.dtype}; give a floating-point tensor")
    if chosen == "exact":
        return torch.sigmoid(x)
    if chosen == "hard":
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        return _apply(HardSigmoid, x) if needs_gradient else torch_functional.hardsigmoid(x)
    return _apply(TableSigmoid, x)


def _apply(function: type[torch.autograd.Function], x: Tensor) -> Tensor:
    y: Tensor = function.apply(x)[0]
    return y


def _choose_form(form: str, max_error: float) -> str:
    if form not in get_args(Form):
        raise ConfigError(explain_unknown("form of the sigmoid", form, get_args(Form)))
    if not max_error >= 0:
        raise ConfigError(f"max_error is {max_error}; give 0 or more")
    if form == "auto":
        return "hard" if max_error >= MAX_ERRORS["hard"] else "exact"
    if MAX_ERRORS[form] > max_error:
        raise ConfigError(
            f"form {form!r} is up to {MAX_ERRORS[form]} away from the sigmoid and max_error is {max_error}; "
            "raise max_error, or choose form 'auto'"
        )
    return form


class HardSigmoid(torch.autograd.Function):
    """`clamp(x / 6 + 1/2, 0, 1)`, keeping `x` cut to [-3, 3] and truncated: an int8 that is +-3 where it is flat."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        # Through the kernels that autograd does not see here; a conversion of values beyond 127 would wrap around.
        return torch_functional.hardsigmoid(x), x.clamp(-_HARD_LIMIT, _HARD_LIMIT).to(torch.int8)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        context.mark_non_differentiable(outputs[1])
        context.save_for_backward(outputs[1])

    @staticmethod
    def backward(context: Any, gradient: Tensor, _: Any) -> Tensor:
        codes: Tensor = context.saved_tensors[0]
        if gradient.requires_grad:  # to be differentiated again, for which the kernel has no rule
            return gradient * ((codes.abs() < _HARD_LIMIT) / (2 * _HARD_LIMIT)).to(gradient.dtype)
        return torch.ops.aten.hardsigmoid_backward(gradient, codes.to(gradient.dtype))  # type: ignore[no-any-return]


class TableSigmoid(torch.autograd.Function):
    """The sigmoid's chords over equal pieces, keeping the number of each value's piece in a byte."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        slopes, intercepts = _pieces(x.device)
        wide = x.float() if x.dtype.itemsize < 4 else x
        position = wide * (_NUM_PIECES / (2 * _TABLE_LIMIT)) + (_NUM_PIECES / 2 + 1)
        piece = position.clamp_(0, _NUM_PIECES + 1).to(torch.uint8)
        index = piece.int()
        # A flat piece has slope 0, and 0 times an infinite x is no number.
        y = torch.addcmul(intercepts[index].to(wide), slopes[index].to(wide), wide.clamp(-_FARTHEST, _FARTHEST))
        return y.to(x.dtype), piece

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        context.mark_non_differentiable(outputs[1])
        context.save_for_backward(outputs[1])

    @staticmethod
    def backward(context: Any, gradient: Tensor, _: Any) -> Tensor:
        piece: Tensor = context.saved_tensors[0]
        slopes, _ = _pieces(gradient.device)
        return gradient * slopes[piece.int()].to(gradient.dtype)


_FARTHEST = 1e4  # far outside the table, and finite in every dtype


def _pieces(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table on `device`, made once; a compiler puts it into its graph instead."""
    return _make_pieces(device) if torch.compiler.is_compiling() else _kept_pieces(device)


def _make_pieces(device: torch.device) -> tuple[Tensor, Tensor]:
    """(256,) slopes and intercepts; the first and the last piece are flat, at the height of the table's ends."""
    edges = torch.linspace(-_TABLE_LIMIT, _TABLE_LIMIT, _NUM_PIECES + 1, dtype=torch.float64)
    heights = torch.sigmoid(edges)
    slopes = heights.diff() / edges.diff()
    flat = torch.zeros(1, dtype=torch.float64)
    slopes = torch.cat((flat, slopes, flat))
    intercepts = torch.cat((heights[:1], heights[:-1] - slopes[1:-1] * edges[:-1], heights[-1:]))
    return slopes.float().to(device), intercepts.float().to(device)


_kept_pieces = functools.cache(_make_pieces)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch_functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch_functional)})
