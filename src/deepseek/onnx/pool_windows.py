"""Pooling of ONNX: which windows there are, what lies in each, and what is counted.

torch pads both ends of an axis alike, at most by half a window. ONNX pads each end as it likes, and with `ceil_mode`
the last window may reach beyond the padding; a window that would lie in the padding at the end alone does not exist
(onnx/onnx#4958). Here the input is padded to exactly the windows that ONNX defines, and then pooled without padding.
An average divides by the values that are counted: those of the input, and with `count_include_pad` the padding as well,
but never what `ceil_mode` adds. Definition: https://onnx.ai/onnx/operators/onnx__AveragePool.html.

The padding of SAME_UPPER and SAME_LOWER is negative where strides reach beyond the window: values at the ends are then
left out, as the definition's formula says and ONNX Runtime does for averages (it refuses such a MaxPool when it runs,
and ONNX's own reference such an AveragePool; TensorFlow, which the definition links to, starts at the first value).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PoolWindow(NamedTuple):
    """The windows of a pooling, one number per spatial axis; a tuple, so that it can stand in a node of a graph."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    """Padding in front of each axis."""
    after: tuple[int, ...]
    same: str
    """SAME_UPPER or SAME_LOWER, where the padding follows from the length; else empty."""
    is_ceil: bool

    @property
    def is_plain(self) -> bool:
        """Return whether torch pools with these windows as they are."""
        is_narrow = all(2 * pad <= size for pad, size in zip(self.before, self.kernel, strict=True))
        return not self.same and self.before == self.after and is_narrow

    def count_windows(self, axis: int, length: int) -> tuple[int, int, int]:
        """Return how many windows a spatial axis of that length has, and its padding before and after."""
        stride, reach = self.strides[axis], (self.kernel[axis] - 1) * self.dilations[axis] + 1
        if self.same:
            num_windows = -(-length // stride)
            total = (num_windows - 1) * stride + reach - length
            before = int((total + (self.same == "SAME_LOWER")) / 2)  # toward zero, as ONNX Runtime divides
            return num_windows, before, total - before
        before, after = self.before[axis], self.after[axis]
        free = length + before + after - reach
        num_windows = (-(-free // stride) if self.is_ceil else free // stride) + 1
        if self.is_ceil and (num_windows - 1) * stride >= length + before:
            num_windows -= 1
        return num_windows, before, after


def max_pool(x: Tensor, window: PoolWindow) -> Tensor:
    """Take the largest value of each window; padding never wins."""
    if not x.is_floating_point():  # which torch pools in two dimensions only
        return _reduce_windows(torch.amax, _fit(x, window, torch.iinfo(x.dtype).min), window)
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(window.kernel)]
    fitted = _fit(x, window, -math.inf)
    pooled: Tensor = function(fitted, list(window.kernel), list(window.strides), 0, list(window.dilations))
    return pooled


def average_pool(x: Tensor, window: PoolWindow, counts_padding: bool) -> Tensor:
    """Take the mean of each window over what is counted."""
    counted = torch.ones_like(x[:1, :1])
    if counts_padding:
        counted = F.pad(counted, _widths(x, window), value=1.0)
        counted = _stretch(counted, window, x.shape[2:])
    else:
        counted = _fit(counted, window, 0.0)
    return _reduce_windows(torch.sum, _fit(x, window, 0.0), window) / _reduce_windows(torch.sum, counted, window)


def lp_pool(x: Tensor, window: PoolWindow, power: int) -> Tensor:
    """Take the `power`-norm of each window."""
    return _reduce_windows(torch.sum, _fit(x, window, 0.0).abs().pow(power), window).pow(1 / power)


def lp_norm(x: Tensor, dims: list[int], power: int) -> Tensor:
    """Compute the `power`-norm over `dims`, which stay with length 1."""
    return x.abs().pow(power).sum(dims, keepdim=True).pow(1 / power)


def _widths(x: Tensor, window: PoolWindow) -> list[int]:
    """Return the padding of ONNX in torch's order: the last axis first."""
    pads = [window.count_windows(axis, length)[1:] for axis, length in enumerate(x.shape[2:])]
    return [width for pair in reversed(pads) for width in pair]


def _fit(x: Tensor, window: PoolWindow, fill: float) -> Tensor:
    """Pad or cut each spatial axis to exactly the windows that ONNX defines."""
    return _stretch(F.pad(x, _widths(x, window), value=fill), window, x.shape[2:], fill)


def _stretch(padded: Tensor, window: PoolWindow, lengths: Sequence[int], fill: float = 0.0) -> Tensor:
    """Continue or cut the padded axes to where the last window of an input of these `lengths` ends."""
    for axis, length in enumerate(lengths):
        dim, num_windows = axis + 2, window.count_windows(axis, length)[0]
        needed = (num_windows - 1) * window.strides[axis] + (window.kernel[axis] - 1) * window.dilations[axis] + 1
        missing = max(0, needed - padded.shape[dim])
        padded = F.pad(padded, [0, 0] * (padded.dim() - 1 - dim) + [0, missing], value=fill).narrow(dim, 0, needed)
    return padded


def _reduce_windows(function: Callable[[Tensor, int], Tensor], x: Tensor, window: PoolWindow) -> Tensor:
    """Reduce each window by a sum or an extreme, one axis after the other."""
    for axis, (size, stride, dilation) in enumerate(zip(window.kernel, window.strides, window.dilations, strict=True)):
        x = function(x.unfold(axis + 2, (size - 1) * dilation + 1, stride)[..., ::dilation], -1)
    return x
