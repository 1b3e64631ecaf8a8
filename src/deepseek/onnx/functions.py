"""ONNX operators that take more than one call of torch, as functions, so that each stays one node of the graph.

The translations in `operators` put them into the graph. Each is named after what it computes; arguments are in the
order of ONNX, axes are whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` as `dtype`."""
    return x.to(dtype)


def widen(x: Tensor, chosen: Sequence[torch.dtype]) -> Tensor:
    """Return `x` as FP32, unless it comes in one of the types that a backend may have `chosen`."""
    return x if x.dtype in chosen else x.float()


def number_line(start: float, limit: float, delta: float, **options: Any) -> Tensor:
    """Count from `start` by `delta` up to `limit`; nothing where that leads away from it."""
    has_any = (limit - start) / delta > 0
    return torch.arange(start, limit if has_any else start, delta, **options)


def wrap_indices(indices: Tensor, length: int) -> Tensor:
    """Count negative indices from the end."""
    return torch.where(indices < 0, indices + length, indices)


def choose(condition: Any, x: Any, y: Any) -> Any:
    """Return `x` where `condition` holds, else `y`, for plain numbers."""
    return x if condition else y


def both(x: Any, y: Any) -> bool:
    """Return whether two plain truth values hold."""
    return bool(x) and bool(y)


def either(x: Any, y: Any) -> bool:
    """Return whether one of two plain truth values holds."""
    return bool(x) or bool(y)


def larger(x: Any, y: Any) -> Any:
    """Return the larger of two plain numbers."""
    return max(x, y)


def smaller(x: Any, y: Any) -> Any:
    """Return the smaller of two plain numbers."""
    return min(x, y)


def nowhere(x: Tensor) -> Tensor:
    """Return False everywhere."""
    return torch.zeros_like(x, dtype=torch.bool)


# ---- activations


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute alpha x + beta, clipped to 0 and 1."""
    return torch.clamp(alpha * x + beta, 0, 1)


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """Compute x, or alpha x below zero."""
    return F.leaky_relu(x, alpha)


def selu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute gamma x, or gamma alpha (e^x - 1) below zero."""
    return gamma * F.elu(x, alpha)


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """Compute x, or zero up to alpha."""
    return F.threshold(x, alpha, 0)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Compute x, or slope x below zero; the slope is broadcast from the right, as everywhere in ONNX."""
    return torch.where(x < 0, slope * x, x)


def softmax_of_rows(x: Tensor, axis: int, is_log: bool) -> Tensor:
    """Compute softmax as opsets before 13 define it: over all that follows `axis`, taken as one row."""
    rows = x.flatten(axis)
    return (torch.log_softmax(rows, -1) if is_log else torch.softmax(rows, -1)).reshape(x.shape)


def power(x: Tensor, exponent: Any) -> Tensor:
    """Raise x to the `exponent`, in the dtype of x."""
    return torch.pow(x, exponent).to(x.dtype)


# ---- shapes


def flatten(x: Tensor, axis: int) -> Tensor:
    """Flatten to a matrix: what comes before `axis`, and what follows."""
    return (
        x.reshape(x.shape[:axis].numel(), -1)
        if x.numel()
        else x.reshape(x.shape[:axis].numel(), x.shape[axis:].numel())
    )


def split_evenly(x: Tensor, num_parts: int, axis: int) -> tuple[Tensor, ...]:
    """Split into equal parts, the last ones shorter or empty where they do not fit."""
    length = x.shape[axis]
    size = -(-length // num_parts)
    starts = [min(index * size, length) for index in range(num_parts)]
    return tuple(x.narrow(axis, start, min(size, length - start)) for start in starts)


def expand(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Broadcast `x` against a shape, in both directions."""
    rank = max(x.dim(), len(lengths))
    own, wanted = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(lengths)) + list(lengths)
    return x.expand([length if want == 1 else want for length, want in zip(own, wanted, strict=True)])


def take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Take slices of `x` along `axis`; negative indices count from the end."""
    indices = wrap_indices(indices, x.shape[axis])
    shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    return x.index_select(axis, indices.reshape(-1)).reshape(shape)


def cut_backwards(x: Tensor, dim: int, first: int, last: int, stride: int) -> Tensor:
    """Cut `x[first:last:stride]` along `dim` for a negative stride; ONNX clips both ends to the axis, unlike Python."""
    length = x.shape[dim]
    first, last = (bound + length if bound < 0 else bound for bound in (first, last))
    positions = range(min(max(first, 0), length - 1), min(max(last, -1), length - 1), stride)
    return x.index_select(dim, torch.tensor(list(positions), dtype=torch.int64, device=x.device))


def pad_from_inside(x: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """Continue `x` beyond both ends of `dim` with its edge, its mirror image, or from the other end."""
    length = x.shape[dim]
    positions = torch.arange(-before, length + after, device=x.device)
    if mode == "edge":
        positions = positions.clamp(0, length - 1)
    elif mode == "wrap":
        positions = positions % length
    elif length > 1:  # reflect: there and back again without the ends, a saw-tooth of period 2 (length - 1)
        positions = (length - 1) - ((positions % (2 * (length - 1))) - (length - 1)).abs()
    else:
        positions = torch.zeros_like(positions)
    return x.index_select(dim, positions)


def pad_same(
    x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], is_upper: bool, fill: float
) -> Tensor:
    """Pad for ceil(length / stride) windows; the odd one goes to the end with `is_upper`."""
    flat: list[int] = []
    rows = zip(x.shape[2:], kernel, strides, dilations, strict=True)
    for length, size, stride, dilation in reversed(list(rows)):
        covered = (-(-length // stride) - 1) * stride + (size - 1) * dilation + 1
        total = max(0, covered - length)
        small = total // 2
        flat += [small, total - small] if is_upper else [total - small, small]
    return F.pad(x, flat, value=fill)


def depth_to_space(x_BCHW: Tensor, size: int, mode: str) -> Tensor:
    """Move channels to blocks of pixels."""
    if mode == "CRD":
        return F.pixel_shuffle(x_BCHW, size)
    batch, channels, height, width = x_BCHW.shape
    blocks = x_BCHW.reshape(batch, size, size, channels // size**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // size**2, height * size, width * size)


def space_to_depth(x_BCHW: Tensor, size: int, mode: str) -> Tensor:
    """Move blocks of pixels to channels."""
    if mode == "CRD":
        return F.pixel_unshuffle(x_BCHW, size)
    batch, channels, height, width = x_BCHW.shape
    blocks = x_BCHW.reshape(batch, channels, height // size, size, width // size, size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * size**2, height // size, width // size)


def gather_elements(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Take one element of `x` along `axis` for every index."""
    return x.gather(axis, wrap_indices(indices, x.shape[axis]).long())


_SCATTERS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, axis: int, reduction: str) -> Tensor:
    """Replace one element of `x` along `axis`, or combine it by `reduction`, for every index."""
    positions = wrap_indices(indices, x.shape[axis]).long()
    if reduction == "none":
        return x.scatter(axis, positions, updates)
    return x.scatter_reduce(axis, positions, updates, _SCATTERS[reduction])


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int) -> Tensor:
    """Take slices of `x` at the coordinates in the last dimension of `indices`, per row of the leading `batch_dims`."""
    depth, batch = indices.shape[-1], list(x.shape[:batch_dims])
    rows, positions = x.reshape(-1, *x.shape[batch_dims:]), indices.reshape(-1, *indices.shape[batch_dims:])
    row_index = torch.arange(rows.shape[0], device=x.device).reshape(-1, *[1] * (positions.dim() - 2))
    picked = rows[(row_index.expand(positions.shape[:-1]), *positions.unbind(-1))] if depth else rows
    return picked.reshape(batch + list(indices.shape[batch_dims:-1]) + list(x.shape[batch_dims + depth :]))


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """Replace slices of `x` at the coordinates in the last dimension of `indices`, or combine them by `reduction`."""
    if reduction in ("none", "add"):
        return x.index_put(tuple(indices.unbind(-1)), updates, accumulate=reduction == "add")
    depth = indices.shape[-1]
    numbers = torch.arange(x.shape[:depth].numel(), device=x.device).reshape(x.shape[:depth])
    rows = numbers[tuple(indices.unbind(-1))].reshape(-1)
    flat, parts = x.reshape(numbers.numel(), -1), updates.reshape(rows.numel(), -1)
    rows = rows[:, None].expand(-1, flat.shape[1])
    return flat.scatter_reduce(0, rows, parts, _SCATTERS[reduction]).reshape(x.shape)


def eye_like(x: Tensor, diagonal: int, dtype: torch.dtype) -> Tensor:
    """Return ones on a diagonal, in the shape of a matrix."""
    rows, columns = (torch.arange(length, device=x.device) for length in x.shape)
    return (columns == rows[:, None] + diagonal).to(dtype)


def one_hot(indices: Tensor, depth: int, off_on: Tensor, axis: int) -> Tensor:
    """Return the second of two values where an index points, the first elsewhere."""
    positions = torch.arange(depth, device=indices.device)
    is_there = torch.remainder(indices, depth).unsqueeze(-1) == positions
    in_range = (indices >= -depth) & (indices < depth)
    values = torch.where(is_there & in_range.unsqueeze(-1), off_on[1], off_on[0])
    return values.movedim(-1, axis)


# ---- reductions


def product(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Multiply over `dims`."""
    for dim in sorted((dim % x.dim() for dim in dims), reverse=True):
        x = x.prod(dim, keepdim=keepdim, dtype=x.dtype)
    return x


def norm_1(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Sum absolute values."""
    return x.abs().sum(dims, keepdim=keepdim, dtype=x.dtype) if dims else x.abs()


def norm_2(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Compute the root of the sum of squares."""
    return sum_of_squares(_real(x), dims, keepdim).sqrt().to(x.dtype)


def sum_of_squares(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Sum squares."""
    return (x * x).sum(dims, keepdim=keepdim, dtype=x.dtype) if dims else x * x


def log_of_sum(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Compute the logarithm of the sum."""
    return (total(x, dims, keepdim) if dims else x).log().to(x.dtype)


def log_sum_exp(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Compute the logarithm of the sum of exponentials."""
    return _real(x).logsumexp(dims, keepdim=keepdim).to(x.dtype) if dims else x


def total(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Sum in the dtype of x, where torch would sum whole numbers as int64."""
    return x.sum(dims, keepdim=keepdim, dtype=x.dtype)


def mean(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Compute the mean in the dtype of x; of whole numbers it is cut to one."""
    if x.is_floating_point():
        return x.mean(dims, keepdim=keepdim)
    return x.double().mean(dims, keepdim=keepdim).trunc().to(x.dtype)


def largest(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Take the largest; over nothing, the lowest value of the dtype."""
    return _extreme(x, dims, keepdim, is_max=True)


def smallest(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Take the smallest; over nothing, the highest value of the dtype."""
    return _extreme(x, dims, keepdim, is_max=False)


def _extreme(x: Tensor, dims: list[int], keepdim: bool, *, is_max: bool) -> Tensor:
    if all(x.shape[dim] for dim in dims):
        return (torch.amax if is_max else torch.amin)(x, dims, keepdim)
    if x.dtype is torch.bool:
        neutral: float = not is_max
    elif x.is_floating_point():
        neutral = -math.inf if is_max else math.inf
    else:
        neutral = torch.iinfo(x.dtype).min if is_max else torch.iinfo(x.dtype).max
    return torch.full_like(x.sum(dims, keepdim=keepdim, dtype=torch.float32), neutral, dtype=x.dtype)


def arg_extreme(x: Tensor, dim: int, keepdim: bool, is_max: bool, is_last: bool) -> Tensor:
    """Return the index of the largest or smallest value; among equal ones the first or the last."""
    function = torch.argmax if is_max else torch.argmin
    if not is_last:
        return function(x, dim, keepdim)
    return x.shape[dim] - 1 - function(x.flip(dim), dim, keepdim)


def top_k(x: Tensor, count: int, dim: int, is_largest: bool) -> tuple[Tensor, Tensor]:
    """Return the `count` largest or smallest along `dim` and their indices; among equal ones the first come first."""
    values, indices = torch.sort(x, dim=dim, descending=is_largest, stable=True)
    return values.narrow(dim, 0, count), indices.narrow(dim, 0, count)


def _real(x: Tensor) -> Tensor:
    """Return whole numbers as doubles, which roots and logarithms are computed in."""
    return x if x.is_floating_point() else x.double()


PLAIN_REDUCTIONS = (mean, total, largest, smallest, product, log_sum_exp)  # x itself over no dimension


def cumsum(x: Tensor, dim: int, is_exclusive: bool, is_reversed: bool) -> Tensor:
    """Compute running sums along `dim`, from the end where reversed, without the own element where exclusive."""
    return _running(torch.cumsum, x, dim, is_exclusive, is_reversed, start=0)


def cumprod(x: Tensor, dim: int, is_exclusive: bool, is_reversed: bool) -> Tensor:
    """Compute running products along `dim`, from the end where reversed, without the own element where exclusive."""
    return _running(torch.cumprod, x, dim, is_exclusive, is_reversed, start=1)


def _running(
    function: Callable[..., Tensor], x: Tensor, dim: int, is_exclusive: bool, is_reversed: bool, *, start: int
) -> Tensor:
    x = x.flip(dim) if is_reversed else x
    if is_exclusive:  # shifted and not subtracted: inf - inf is none, and small sums after large ones would be lost
        first = torch.full_like(x.narrow(dim, 0, min(1, x.shape[dim])), start)
        x = torch.cat([first, x.narrow(dim, 0, max(0, x.shape[dim] - 1))], dim)
    sums = function(x, dim, dtype=x.dtype)
    return sums.flip(dim) if is_reversed else sums


# ---- layers


def gemm(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Compute alpha a b + beta c."""
    scaled = a @ b if alpha == 1 else alpha * (a @ b)
    if c is None or beta == 0:
        return scaled.to(a.dtype)
    return (scaled + (c if beta == 1 else beta * c)).to(a.dtype)


def layer_norm(x: Tensor, axis: int, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """Normalize over all dimensions from `axis` on, with a scale that is broadcast."""
    y = F.layer_norm(x, x.shape[axis:], eps=eps) * scale
    return y if shift is None else y + shift


def layer_norm_with_statistics(
    x: Tensor, axis: int, scale: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer norm over all dimensions from `axis` on, the mean, and one over the deviation."""
    dims = list(range(axis, x.dim()))
    mean = x.mean(dims, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)
    return layer_norm(x, axis, scale, shift, eps), mean, inverse


def rms_norm(x: Tensor, axis: int, scale: Tensor, eps: float) -> Tensor:
    """Divide x by the root of its mean square, from `axis` on."""
    return F.rms_norm(x, x.shape[axis:], eps=eps) * scale


def lp_normalize(x: Tensor, order: int, axis: int) -> Tensor:
    """Divide x by its norm along `axis`; zero where that is zero."""
    norm = x.abs().sum(axis, keepdim=True) if order == 1 else (x * x).sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """Divide x by a power of the mean square of its neighbors among the channels (Krizhevsky et al. 2012)."""
    before = (size - 1) // 2
    squares = F.pad(x * x, [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    sums = squares.unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * sums) ** beta


# ---- quantized


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, axis: int) -> Tensor:
    """Compute round(x / scale) + zero, kept inside `dtype`; ties go to even numbers."""
    scale, zero = along(scale, x, axis), None if zero is None else along(zero, x, axis)
    bounds = torch.iinfo(dtype)
    steps = torch.round(x / scale)
    steps = steps if zero is None else steps + zero.to(steps.dtype)
    return steps.clamp(bounds.min, bounds.max).to(dtype)


def dequantize(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """Compute (x - zero) scale."""
    scale, zero = along(scale, x, axis), None if zero is None else along(zero, x, axis)
    steps = x.to(torch.int32) if zero is None else x.to(torch.int32) - zero.to(torch.int32)
    return steps.to(scale.dtype) * scale


def along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Shape a vector of one value per index of `axis` to be broadcast over `x`."""
    if values.dim() == 0 or values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])


def quantize_dynamically(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return bytes over the range of `x`, which includes zero; their scale; their zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None) -> Tensor:
    """Multiply two matrices of bytes to int32; in doubles, which hold every such sum exactly."""
    wide_a, wide_b = a.double(), b.double()
    if a_zero is not None:
        wide_a = wide_a - (a_zero.double().unsqueeze(-1) if a_zero.dim() else a_zero.double())
    if b_zero is not None:
        wide_b = wide_b - b_zero.double()
    return (wide_a @ wide_b).to(torch.int32)


def center(x: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """Compute x - zero in doubles, which hold every sum of products of bytes exactly."""
    return x.double() if zero is None else x.double() - along(zero.double(), x, axis)


def requantize(sums: Tensor, x_scale: Tensor, w_scale: Tensor, y_scale: Tensor, y_zero: Tensor, axis: int) -> Tensor:
    """Turn sums of products of steps into steps of the output."""
    scale = x_scale.double() * along(w_scale.double(), sums, axis) / y_scale.double()
    bounds = torch.iinfo(y_zero.dtype)
    return (torch.round(sums * scale) + y_zero.double()).clamp(bounds.min, bounds.max).to(y_zero.dtype)


def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """Multiply quantized matrices and quantize the result."""
    return requantize(matmul_integer(a, b, a_zero, b_zero).double(), a_scale, b_scale, y_scale, y_zero, -1)
