"""Resize of ONNX, one axis after the other: where a new pixel lies among the old ones, and which of them it is made of.

Nearest takes one old pixel, linear two, cubic four, with weights from the distance. All the ways in which ONNX maps
positions (`half_pixel`, `align_corners`, `asymmetric`, ...) are rows of `MAPPINGS`. Interpolation is separable, so
axis by axis gives what the definition gives for all of them at once.

With a scale, the length asked for may be no whole number (7 * 0.6 = 4.2). The definition calls `length_resized` the
length of the result, which is whole, so `align_corners` lays the last new pixel on the last old one, as torch and ONNX
Runtime do; two of ONNX's examples and its reference take 4.2 there. All take the given scale where a formula has one,
but for ONNX Runtime where no length changes at all: it then copies the input.
Definition: https://onnx.ai/onnx/operators/onnx__Resize.html; cubic weights: Keys 1981.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
import torch
from torch import Tensor


def _symmetric(new: Tensor, scale: float, old_length: int, new_length: int) -> Tensor:
    """Map half pixels around the middle of the old ones, where the new length is cut off."""
    adjustment = new_length / (scale * old_length)
    offset = old_length / 2 * (1 - adjustment)
    return offset + (new + 0.5) / scale - 0.5


# (new positions, scale, old length, new length) -> old positions
MAPPINGS: dict[str, Callable[[Tensor, float, int, int], Tensor]] = {
    "half_pixel": lambda new, scale, old_length, new_length: (new + 0.5) / scale - 0.5,
    "half_pixel_symmetric": _symmetric,
    "pytorch_half_pixel": lambda new, scale, old_length, new_length: (
        (new + 0.5) / scale - 0.5 if new_length > 1 else new * 0
    ),
    "align_corners": lambda new, scale, old_length, new_length: (
        new * (old_length - 1) / (new_length - 1) if new_length > 1 else new * 0
    ),
    "asymmetric": lambda new, scale, old_length, new_length: new / scale,
}
_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda position: torch.ceil(position - 0.5),
    "round_prefer_ceil": lambda position: torch.floor(position + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def resize_axis(
    x: Tensor,
    axis: int,
    wanted: float,
    is_scale: bool,
    mode: str,
    mapping: str,
    nearest_mode: str,
    cubic_coefficient: float,
) -> Tensor:
    """Resize `x` along `axis` to the length `wanted`, or to that many times the old one."""
    length = x.shape[axis]
    new_length = scale_length(length, wanted) if is_scale else int(wanted)
    scale = float(wanted) if is_scale else new_length / length
    new = torch.arange(new_length, device=x.device, dtype=torch.float64 if not is_scale else torch.float32)
    positions = MAPPINGS[mapping](new, scale, length, new_length)
    if mode == "nearest":
        return _take(x, axis, _ROUNDINGS[nearest_mode](positions))
    first = torch.floor(positions)
    distance = (positions - first).to(x.dtype if x.is_floating_point() else torch.float32)
    taps = _linear(distance) if mode == "linear" else _cubic(distance, cubic_coefficient)
    shape = [-1 if dim == axis else 1 for dim in range(x.dim())]
    parts = [_take(x, axis, first + offset) * weight.reshape(shape) for offset, weight in taps]
    return torch.stack(parts).sum(0).to(x.dtype)


def scale_length(length: int, scale: float) -> int:
    """Return the length of an axis after resizing, rounded as ONNX Runtime and ONNX's shape inference do: in FP32.

    >>> scale_length(10, float(torch.tensor(0.7)))  # 0.7 is 0.69999999 in FP32
    7
    """
    if torch.compiler.is_compiling():  # lengths are symbols there, which NumPy does not take
        return int(length * scale * (1 + 2**-24))
    return int(numpy.float32(length) * numpy.float32(scale))


def _take(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    return x.index_select(axis, positions.clamp(0, x.shape[axis] - 1).long())


def _linear(distance: Tensor) -> list[tuple[int, Tensor]]:
    return [(0, 1 - distance), (1, distance)]


def _cubic(distance: Tensor, a: float) -> list[tuple[int, Tensor]]:
    def near(t: Tensor) -> Tensor:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: Tensor) -> Tensor:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    return [(-1, far(distance + 1)), (0, near(distance)), (1, near(1 - distance)), (2, far(2 - distance))]
