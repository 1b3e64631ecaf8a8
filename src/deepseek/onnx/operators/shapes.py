"""Operators that move, cut, join and resize without computing, and those that ONNX computes shapes with."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deepseek.onnx import functions, resizing
from deepseek.onnx.files import UnsupportedOperatorError, to_torch, torch_dtype
from deepseek.onnx.graph_builder import GraphBuilder, Lengths, Value, as_lengths
from deepseek.onnx.operators.elementwise import is_scalar_value
from deepseek.onnx.operators.node import Operator, Result, Translator


def _constant(builder: GraphBuilder, op: Operator) -> Result:
    if "value" in op.attributes:
        return builder.widen(to_torch(op.get("value", None)))
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64)):
        for key in (name, f"{name}s"):
            if key in op.attributes:
                return torch.tensor(op.get(key, None), dtype=dtype)
    raise UnsupportedOperatorError(f"a constant of kind {', '.join(op.attributes)} is not followed")


def _constant_of_shape(builder: GraphBuilder, op: Operator, shape: Value) -> Result:
    value = builder.widen(to_torch(op.get("value", None))).reshape(()) if "value" in op.attributes else torch.zeros(())
    lengths = builder.numbers(shape, "shape")
    return builder.create(torch.full, lengths, value.item(), dtype=value.dtype)


def _shape(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    if isinstance(x, Lengths):
        return torch.tensor([] if x.is_scalar else [len(x.numbers)], dtype=torch.int64)
    lengths = builder.shape(x)
    return as_lengths(lengths[slice(op.get("start", 0), op.get("end", None))])


def _size(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    if isinstance(x, Lengths):
        return torch.tensor(len(x.numbers))
    count: Any = 1
    for length in builder.shape(x):
        count = builder.call(operator.mul, count, length)
    return as_lengths([count], is_scalar=True)


def _reshape(builder: GraphBuilder, op: Operator, x: Value, shape: Value) -> Result:
    lengths = builder.numbers(shape, "shape")
    if isinstance(x, Lengths):
        return Lengths(x.numbers, is_scalar=not lengths)
    if not op.flag("allowzero"):
        lengths = [
            builder.length(x, dim) if isinstance(length, int) and length == 0 else length
            for dim, length in enumerate(lengths)
        ]
    return builder.call(torch.reshape, x, lengths)


def _flatten(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    axis = op.get("axis", 1)
    return builder.call(functions.flatten, x, axis + builder.rank(x) if axis < 0 else axis)


def _transpose(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    order = op.get("perm", list(range(builder.rank(x)))[::-1])
    return builder.call(torch.permute, x, list(order))


def _squeeze(builder: GraphBuilder, op: Operator, x: Value, axes: Value = None) -> Result:
    if isinstance(x, Lengths):
        return Lengths(x.numbers, is_scalar=True)
    dims = op.get("axes", None) if axes is None else builder.numbers(axes, "axes")
    if dims is None:
        return builder.call(torch.squeeze, x)
    return builder.call(torch.squeeze, x, tuple(dims))


def _unsqueeze(builder: GraphBuilder, op: Operator, x: Value, axes: Value = None) -> Result:
    dims = op.get("axes", None) if axes is None else builder.numbers(axes, "axes")
    if isinstance(x, Lengths) and x.is_scalar and len(dims) == 1:
        return Lengths(x.numbers)
    rank = builder.rank(x) + len(dims)
    for dim in sorted(dim % rank for dim in dims):
        x = builder.call(torch.unsqueeze, x, dim)
    return x


def _concat(builder: GraphBuilder, op: Operator, *values: Value) -> Result:
    axis = op.get("axis", 0)
    if builder.is_lengths(*values):
        return as_lengths(number for value in values for number in builder.numbers(value, "part"))
    return builder.call(torch.cat, [builder.tensor(value) for value in values], dim=axis)


def _split(builder: GraphBuilder, op: Operator, x: Value, sizes: Value = None) -> Result:
    axis = op.get("axis", 0)
    parts = op.get("split", None) if sizes is None else builder.numbers(sizes, "sizes")
    if isinstance(x, Lengths):
        return _split_lengths(x, parts, op.num_outputs)
    if parts is None:
        given = builder.call(functions.split_evenly, x, op.num_outputs, axis)
    else:
        given = builder.call(torch.split, x, list(parts), axis)
    return tuple(builder.item(given, index) for index in range(op.num_outputs))


def _split_lengths(x: Lengths, parts: Any, num_outputs: int) -> tuple[Value, ...]:
    sizes = parts or [math.ceil(len(x.numbers) / num_outputs)] * num_outputs
    starts = [sum(sizes[:index]) for index in range(num_outputs)]
    return tuple(as_lengths(x.numbers[start : start + size]) for start, size in zip(starts, sizes, strict=True))


def _slice(
    builder: GraphBuilder, op: Operator, x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None
) -> Result:
    begin, end = builder.numbers(starts, "starts"), builder.numbers(ends, "ends")
    dims = list(range(len(begin))) if axes is None else builder.numbers(axes, "axes")
    strides = [1] * len(begin) if steps is None else builder.numbers(steps, "steps")
    cuts = list(zip(dims, begin, end, strides, strict=True))
    if isinstance(x, Lengths):
        ((_, first, last, stride),) = cuts
        return as_lengths(x.numbers[slice(first, last, stride)])
    for dim, first, last, stride in cuts:
        x = _cut(builder, x, dim % builder.rank(x), first, last, stride)
    return x


def _cut(builder: GraphBuilder, x: Value, dim: int, first: Any, last: Any, stride: Any) -> Result:
    if not isinstance(stride, int):
        raise UnsupportedOperatorError("its steps are computed while the model runs, and must be constants")
    if stride < 0:
        return builder.call(functions.cut_backwards, x, dim, first, last, stride)
    index = (*[slice(None)] * dim, slice(first, last, stride))
    return builder.call(operator.getitem, x, index)


def _gather(builder: GraphBuilder, op: Operator, x: Value, indices: Value) -> Result:
    axis = op.get("axis", 0)
    if isinstance(x, Lengths):
        wanted = builder.numbers(indices, "indices")
        return as_lengths((x.numbers[index] for index in wanted), is_scalar=is_scalar_value(indices))
    axis %= builder.rank(x)
    length = builder.sample(x).shape[axis]
    if isinstance(indices, Tensor) and indices.numel() and not -length <= indices.min() <= indices.max() < length:
        raise IndexError(f"its indices reach beyond the {length} slices there are for the sample inputs")
    if isinstance(indices, Tensor) and indices.dim() == 0:
        return builder.call(torch.select, x, axis, int(indices))
    if isinstance(x, Tensor) and x.dim() == 2 and axis == 0 and x.is_floating_point() and isinstance(indices, fx.Node):
        table = nn.Embedding.from_pretrained(x, freeze=False)
        positive = builder.call(functions.wrap_indices, indices, x.shape[0])
        return builder.call_module(table, builder.name_of(x, op.name or "embedding"), positive)
    return builder.call(functions.take, x, indices, axis)


def _expand(builder: GraphBuilder, op: Operator, x: Value, shape: Value) -> Result:
    return builder.call(functions.expand, x, builder.numbers(shape, "shape"))


def _tile(builder: GraphBuilder, op: Operator, x: Value, repeats: Value) -> Result:
    return builder.call(torch.tile, x, builder.numbers(repeats, "repeats"))


def _range(builder: GraphBuilder, op: Operator, start: Value, limit: Value, delta: Value) -> Result:
    dtype = builder.sample(start).dtype
    ends = [builder.numbers(value, "bound")[0] for value in (start, limit, delta)]
    return builder.create(functions.number_line, *ends, dtype=dtype)


def _pad(builder: GraphBuilder, op: Operator, x: Value, pads: Value, value: Value = None, axes: Value = None) -> Result:
    rank = builder.rank(x)
    dims = list(range(rank)) if axes is None else [axis % rank for axis in builder.numbers(axes, "axes")]
    widths = builder.numbers(pads, "pads")
    before_after = {dim: (widths[index], widths[index + len(dims)]) for index, dim in enumerate(dims)}
    mode = op.choose("mode", "constant", "reflect", "edge", "wrap")
    if mode == "constant":
        fill = 0 if value is None else builder.numbers(value, "value")[0]
        flat = [width for dim in reversed(range(rank)) for width in before_after.get(dim, (0, 0))]
        return builder.call(F.pad, x, flat, value=fill)
    for dim, (before, after) in before_after.items():
        if (before, after) != (0, 0):
            x = builder.call(functions.pad_from_inside, x, dim, before, after, mode)
    return x


def _trilu(builder: GraphBuilder, op: Operator, x: Value, k: Value = None) -> Result:
    diagonal = 0 if k is None else builder.numbers(k, "k")[0]
    return builder.call(torch.triu if op.flag("upper", True) else torch.tril, x, diagonal)


def _depth_to_space(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    return builder.call(functions.depth_to_space, x, op.get("blocksize", 1), op.choose("mode", "DCR", "CRD"))


def _space_to_depth(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    return builder.call(functions.space_to_depth, x, op.get("blocksize", 1), op.choose("mode", "DCR", "CRD"))


def _gather_elements(builder: GraphBuilder, op: Operator, x: Value, indices: Value) -> Result:
    return builder.call(functions.gather_elements, x, indices, op.get("axis", 0))


def _gather_nd(builder: GraphBuilder, op: Operator, x: Value, indices: Value) -> Result:
    return builder.call(functions.gather_nd, x, indices, op.get("batch_dims", 0))


def _scatter_elements(builder: GraphBuilder, op: Operator, x: Value, indices: Value, updates: Value) -> Result:
    return builder.call(functions.scatter_elements, x, indices, updates, op.get("axis", 0), op.get("reduction", "none"))


def _scatter_nd(builder: GraphBuilder, op: Operator, x: Value, indices: Value, updates: Value) -> Result:
    return builder.call(functions.scatter_nd, x, indices, updates, op.get("reduction", "none"))


def _one_hot(builder: GraphBuilder, op: Operator, indices: Value, depth: Value, values: Value) -> Result:
    count = int(builder.numbers(depth, "depth")[0])
    return builder.call(functions.one_hot, indices, count, values, op.get("axis", -1))


def _resize(
    builder: GraphBuilder, op: Operator, x: Value, roi: Value = None, scales: Value = None, sizes: Value = None
) -> Result:
    op.allow(antialias=0, exclude_outside=0, keep_aspect_ratio_policy="stretch")
    mode = op.choose("mode", "nearest", "linear", "cubic")
    mapping = op.get("coordinate_transformation_mode", "half_pixel")
    if mapping == "tf_crop_and_resize" or mapping not in resizing.MAPPINGS:
        raise UnsupportedOperatorError(f"coordinate_transformation_mode={mapping!r} is not followed")
    has_scales = scales is not None and (not isinstance(scales, Tensor) or scales.numel() > 0)
    wanted = builder.numbers(scales if has_scales else sizes, "scales or sizes")
    rank = builder.rank(x)
    axes = [axis % rank for axis in op.get("axes", range(rank))]
    how = (mode, mapping, op.get("nearest_mode", "round_prefer_floor"), op.get("cubic_coeff_a", -0.75))
    for axis, value in zip(axes, wanted, strict=True):
        is_same = value == 1 if has_scales else isinstance(value, int) and value == builder.sample(x).shape[axis]
        if not (is_same and (has_scales or isinstance(x, Tensor))):
            x = builder.call(resizing.resize_axis, x, axis, value, has_scales, *how)
    return x


def _eye_like(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    dtype = builder.dtype(torch_dtype(op.get("dtype", 0))) if "dtype" in op.attributes else builder.sample(x).dtype
    return builder.call(functions.eye_like, x, op.get("k", 0), dtype)


SHAPES: dict[str, Translator] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "OneHot": _one_hot,
    "Expand": _expand,
    "Tile": _tile,
    "Range": _range,
    "Pad": _pad,
    "Trilu": _trilu,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
    "EyeLike": _eye_like,
}
