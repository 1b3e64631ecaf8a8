"""What each ONNX operator is in torch: a table from its name to the function that draws it.

A function takes the drawing, the operator with its attributes, and the inputs (`None` for one that is left out), and
gives its output or a tuple of them. Where opsets differ (axes as attribute or input, the meaning of Softmax's axis),
the function asks `op.opset`. A use of an operator that is not followed (indices of a pooling, blocked quantization)
raises `UnsupportedOperatorError`, never an answer that is nearly right.

Arithmetic on lengths goes through `lengths.py`; what takes more than one call of torch is a function of
`computing.py`, so that one node stays one call in the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deepseek.models.onnx import computing, resizing
from deepseek.models.onnx.drawing import Drawing, Lengths, Value, as_lengths
from deepseek.models.onnx.reading import UnsupportedOperatorError, torch_dtype

Result: TypeAlias = Any  # a Value or a tuple of them; what fx gives is not typed
Function: TypeAlias = "Callable[..., Result]"


@dataclass(frozen=True)
class Operator:
    """One node of an ONNX graph."""

    op_type: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    num_outputs: int = 1

    def get(self, name: str, default: Any) -> Any:
        """An attribute; text as `str`."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def allow(self, **followed: Any) -> None:
        """Raise unless each attribute named here is left out or has the one value that is followed."""
        for name, value in followed.items():
            if self.get(name, value) != value:
                raise UnsupportedOperatorError(f"{name}={self.get(name, value)!r} is not followed, only {value!r}")


# ---- one input, one output


def _unary(function: Callable[..., Any], **keywords: Any) -> Function:
    def draw(drawing: Drawing, op: Operator, x: Value) -> Result:
        return drawing.call(function, x, **keywords)

    return draw


def _activation(function: Callable[..., Any], **attributes: float) -> Function:
    """A function whose keywords are attributes of ONNX; `attributes` are their defaults."""

    def draw(drawing: Drawing, op: Operator, x: Value) -> Result:
        return drawing.call(function, x, **{name: op.get(name, default) for name, default in attributes.items()})

    return draw


def _gelu(drawing: Drawing, op: Operator, x: Value) -> Result:
    return drawing.call(F.gelu, x, approximate=op.get("approximate", "none"))


def _identity(drawing: Drawing, op: Operator, x: Value, *_: Value) -> Result:
    return x


def _dropout(drawing: Drawing, op: Operator, x: Value, ratio: Value = None, training: Value = None) -> Result:
    if training is not None and bool(drawing.constant(training, "training mode")):
        raise UnsupportedOperatorError("dropout that is active is not followed")
    return (x, drawing.call(torch.ones_like, x, dtype=torch.bool)) if op.num_outputs > 1 else x


def _clip(drawing: Drawing, op: Operator, x: Value, low: Value = None, high: Value = None) -> Result:
    if low is None and high is None:
        return x
    bounds = [None if each is None else _bound(drawing, each) for each in (low, high)]
    return drawing.call(torch.clamp, x, *bounds)


def _bound(drawing: Drawing, value: Value) -> Any:
    """A bound of Clip as a plain number where it is known, so that the call says it."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else drawing.tensor(value)


def _prelu(drawing: Drawing, op: Operator, x: Value, slope: Value) -> Result:
    return drawing.call(computing.prelu, x, slope)


# ---- several inputs, element by element


def _binary(function: Callable[..., Any], on_numbers: Callable[..., Any] | None = None) -> Function:
    def draw(drawing: Drawing, op: Operator, x: Value, y: Value) -> Result:
        if on_numbers is not None and drawing.is_lengths(x, y):
            return _each(drawing, on_numbers, x, y)
        return drawing.call(function, x, y)

    return draw


def _each(drawing: Drawing, function: Callable[..., Any], *values: Value) -> Value:
    """`function` number by number over lengths; those of one are repeated."""
    lists = [drawing.numbers(value, "operand") for value in values]
    is_scalar = all(_is_scalar(value) for value in values)
    longest = max(map(len, lists))
    if any(len(each) not in (1, longest) for each in lists):
        raise UnsupportedOperatorError("vectors of lengths that do not match are combined")
    rows = zip(*(each * longest if len(each) == 1 else each for each in lists), strict=True)
    return as_lengths((drawing.call(function, *row) for row in rows), is_scalar=is_scalar)


def _is_scalar(value: Value) -> bool:
    return value.is_scalar if isinstance(value, Lengths) else isinstance(value, Tensor) and value.dim() == 0


def _equal(drawing: Drawing, op: Operator, x: Value, y: Value) -> Result:
    if drawing.is_lengths(x, y):
        return _equal_lengths(drawing, x, y)
    return drawing.call(torch.eq, x, y)


def _equal_lengths(drawing: Drawing, x: Value, y: Value) -> Value:
    """A length is never negative, so `shape == -1`, which exporters write to expand, is known now."""
    lists = [drawing.numbers(value, "operand") for value in (x, y)]
    longest = max(map(len, lists))
    pairs = zip(*(each * longest if len(each) == 1 else each for each in lists), strict=True)
    answers = [
        False if any(isinstance(each, int) and each < 0 for each in pair) else drawing.call(operator.eq, *pair)
        for pair in pairs
    ]
    return as_lengths(answers, is_scalar=_is_scalar(x) and _is_scalar(y))


def _where(drawing: Drawing, op: Operator, condition: Value, x: Value, y: Value) -> Result:
    is_small = isinstance(condition, Lengths) or (isinstance(condition, Tensor) and condition.dim() < 2)
    if is_small and drawing.is_lengths(condition, x, y):
        return _each(drawing, computing.choose, condition, x, y)
    return drawing.call(torch.where, condition, x, y)


def _variadic(function: Callable[..., Any], on_numbers: Callable[..., Any] | None = None) -> Function:
    """An operator of any number of inputs, as a chain of `function`."""
    pair = _binary(function, on_numbers)

    def draw(drawing: Drawing, op: Operator, first: Value, *others: Value) -> Result:
        value: Any = first
        for other in others:
            value = pair(drawing, op, value, other)
        return value

    return draw


def _mean(drawing: Drawing, op: Operator, *values: Value) -> Result:
    return drawing.call(torch.div, OPERATORS["Sum"](drawing, op, *values), len(values))


def _div(drawing: Drawing, op: Operator, x: Value, y: Value) -> Result:
    is_real = drawing.sample(x).is_floating_point()
    if drawing.is_lengths(x, y):
        return _each(drawing, operator.truediv if is_real else operator.floordiv, x, y)
    return drawing.call(torch.div, x, y, rounding_mode=None if is_real else "trunc")


def _mod(drawing: Drawing, op: Operator, x: Value, y: Value) -> Result:
    if drawing.is_lengths(x, y):
        return _each(drawing, operator.mod, x, y)
    return drawing.call(torch.fmod if op.get("fmod", 0) else torch.remainder, x, y)


def _pow(drawing: Drawing, op: Operator, x: Value, y: Value) -> Result:
    exponent = y.item() if isinstance(y, Tensor) and y.numel() == 1 and y.dim() == 0 else y
    return drawing.call(computing.power, x, exponent)


def _each_number(function: Callable[..., Any], on_numbers: Callable[..., Any]) -> Function:
    def draw(drawing: Drawing, op: Operator, x: Value) -> Result:
        if isinstance(x, Lengths):
            return _each(drawing, on_numbers, x)
        return drawing.call(function, x)

    return draw


def _cast(drawing: Drawing, op: Operator, x: Value) -> Result:
    dtype = torch_dtype(op.get("to", 0))
    return _cast_to(drawing, x, dtype)


def _cast_like(drawing: Drawing, op: Operator, x: Value, like: Value) -> Result:
    return _cast_to(drawing, x, drawing.sample(like).dtype)


def _cast_to(drawing: Drawing, x: Value, dtype: torch.dtype) -> Result:
    if isinstance(x, Lengths):
        kind = float if dtype.is_floating_point else bool if dtype is torch.bool else int
        return _each(drawing, kind, x)
    if drawing.sample(x).dtype is dtype:
        return x
    return drawing.call(computing.cast, x, dtype)


def _isinf(drawing: Drawing, op: Operator, x: Value) -> Result:
    signs = (op.get("detect_negative", 1), op.get("detect_positive", 1))
    functions = {(1, 1): torch.isinf, (1, 0): torch.isneginf, (0, 1): torch.isposinf}
    return drawing.call(functions.get(signs, computing.nowhere), x)


# ---- shapes


def _constant(drawing: Drawing, op: Operator) -> Result:
    from deepseek.models.onnx.importing import to_torch

    if "value" in op.attributes:
        return to_torch(op.attributes["value"])
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64)):
        for key in (name, f"{name}s"):
            if key in op.attributes:
                return torch.tensor(op.attributes[key], dtype=dtype)
    raise UnsupportedOperatorError(f"a constant of kind {', '.join(op.attributes)} is not followed")


def _constant_of_shape(drawing: Drawing, op: Operator, shape: Value) -> Result:
    from deepseek.models.onnx.importing import to_torch

    value = to_torch(op.attributes["value"]).reshape(()) if "value" in op.attributes else torch.zeros(())
    lengths = drawing.numbers(shape, "shape")
    return drawing.make(torch.full, lengths, value.item(), dtype=value.dtype)


def _shape(drawing: Drawing, op: Operator, x: Value) -> Result:
    if isinstance(x, Lengths):
        return torch.tensor([] if x.is_scalar else [len(x.numbers)], dtype=torch.int64)
    lengths = drawing.shape(x)
    return as_lengths(lengths[slice(op.get("start", 0), op.get("end", None))])


def _size(drawing: Drawing, op: Operator, x: Value) -> Result:
    if isinstance(x, Lengths):
        return torch.tensor(len(x.numbers))
    count: Any = 1
    for length in drawing.shape(x):
        count = drawing.call(operator.mul, count, length)
    return as_lengths([count], is_scalar=True)


def _reshape(drawing: Drawing, op: Operator, x: Value, shape: Value) -> Result:
    lengths = drawing.numbers(shape, "shape")
    if isinstance(x, Lengths):
        return Lengths(x.numbers, is_scalar=not lengths)
    if not op.get("allowzero", 0):
        lengths = [
            drawing.length(x, place) if isinstance(length, int) and length == 0 else length
            for place, length in enumerate(lengths)
        ]
    return drawing.call(torch.reshape, x, lengths)


def _flatten(drawing: Drawing, op: Operator, x: Value) -> Result:
    axis = op.get("axis", 1)
    return drawing.call(computing.flatten, x, axis + drawing.rank(x) if axis < 0 else axis)


def _transpose(drawing: Drawing, op: Operator, x: Value) -> Result:
    order = op.get("perm", list(range(drawing.rank(x)))[::-1])
    return drawing.call(torch.permute, x, list(order))


def _squeeze(drawing: Drawing, op: Operator, x: Value, axes: Value = None) -> Result:
    if isinstance(x, Lengths):
        return Lengths(x.numbers, is_scalar=True)
    dims = op.get("axes", None) if axes is None else drawing.numbers(axes, "axes")
    if dims is None:
        return drawing.call(torch.squeeze, x)
    return drawing.call(torch.squeeze, x, tuple(dims))


def _unsqueeze(drawing: Drawing, op: Operator, x: Value, axes: Value = None) -> Result:
    dims = op.get("axes", None) if axes is None else drawing.numbers(axes, "axes")
    if isinstance(x, Lengths) and x.is_scalar and len(dims) == 1:
        return Lengths(x.numbers)
    rank = drawing.rank(x) + len(dims)
    for dim in sorted(each % rank for each in dims):
        x = drawing.call(torch.unsqueeze, x, dim)
    return x


def _concat(drawing: Drawing, op: Operator, *values: Value) -> Result:
    if drawing.is_lengths(*values):
        return as_lengths(number for value in values for number in drawing.numbers(value, "part"))
    return drawing.call(torch.cat, [drawing.tensor(value) for value in values], dim=op.get("axis", 0))


def _split(drawing: Drawing, op: Operator, x: Value, sizes: Value = None) -> Result:
    axis = op.get("axis", 0)
    parts = op.get("split", None) if sizes is None else drawing.numbers(sizes, "sizes")
    if isinstance(x, Lengths):
        return _split_lengths(x, parts, op.num_outputs)
    if parts is None:
        given = drawing.call(computing.split_evenly, x, op.num_outputs, axis)
    else:
        given = drawing.call(torch.split, x, list(parts), axis)
    return tuple(drawing.item(given, index) for index in range(op.num_outputs))


def _split_lengths(x: Lengths, parts: Any, num_outputs: int) -> tuple[Value, ...]:
    sizes = parts or [math.ceil(len(x.numbers) / num_outputs)] * num_outputs
    starts = [sum(sizes[:index]) for index in range(num_outputs)]
    return tuple(as_lengths(x.numbers[start : start + size]) for start, size in zip(starts, sizes, strict=True))


def _slice(
    drawing: Drawing, op: Operator, x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None
) -> Result:
    begin, end = drawing.numbers(starts, "starts"), drawing.numbers(ends, "ends")
    dims = list(range(len(begin))) if axes is None else drawing.numbers(axes, "axes")
    strides = [1] * len(begin) if steps is None else drawing.numbers(steps, "steps")
    cuts = list(zip(dims, begin, end, strides, strict=True))
    if isinstance(x, Lengths):
        ((_, first, last, stride),) = cuts
        return as_lengths(x.numbers[slice(first, last, stride)])
    for dim, first, last, stride in cuts:
        x = _cut(drawing, x, dim % drawing.rank(x), first, last, stride)
    return x


def _cut(drawing: Drawing, x: Value, dim: int, first: Any, last: Any, stride: Any) -> Result:
    if not isinstance(stride, int):
        raise UnsupportedOperatorError("its steps are computed while the model runs, and must be constants")
    if stride < 0:
        return drawing.call(computing.cut_backwards, x, dim, first, last, stride)
    index = (*[slice(None)] * dim, slice(first, last, stride))
    return drawing.call(operator.getitem, x, index)


def _gather(drawing: Drawing, op: Operator, x: Value, indices: Value) -> Result:
    axis = op.get("axis", 0)
    if isinstance(x, Lengths):
        wanted = drawing.numbers(indices, "indices")
        return as_lengths((x.numbers[index] for index in wanted), is_scalar=_is_scalar(indices))
    axis %= drawing.rank(x)
    if isinstance(indices, Tensor) and indices.dim() == 0:
        return drawing.call(torch.select, x, axis, int(indices))
    if isinstance(x, Tensor) and x.dim() == 2 and axis == 0 and x.is_floating_point() and isinstance(indices, fx.Node):
        table = nn.Embedding.from_pretrained(x, freeze=False)
        return drawing.call_module(table, drawing.name_of(x, op.name or "embedding"), indices)
    return drawing.call(computing.take, x, indices, axis)


def _expand(drawing: Drawing, op: Operator, x: Value, shape: Value) -> Result:
    return drawing.call(computing.expand, x, drawing.numbers(shape, "shape"))


def _tile(drawing: Drawing, op: Operator, x: Value, repeats: Value) -> Result:
    return drawing.call(torch.tile, x, drawing.numbers(repeats, "repeats"))


def _range(drawing: Drawing, op: Operator, start: Value, limit: Value, delta: Value) -> Result:
    dtype = drawing.sample(start).dtype
    ends = [drawing.numbers(value, "bound")[0] for value in (start, limit, delta)]
    return drawing.make(torch.arange, *ends, dtype=dtype)


def _pad(drawing: Drawing, op: Operator, x: Value, pads: Value, value: Value = None, axes: Value = None) -> Result:
    rank = drawing.rank(x)
    dims = list(range(rank)) if axes is None else [axis % rank for axis in drawing.numbers(axes, "axes")]
    widths = drawing.numbers(pads, "pads")
    before_after = {dim: (widths[place], widths[place + len(dims)]) for place, dim in enumerate(dims)}
    mode = op.get("mode", "constant")
    if mode == "constant":
        fill = 0 if value is None else drawing.numbers(value, "value")[0]
        flat = [width for dim in reversed(range(rank)) for width in before_after.get(dim, (0, 0))]
        return drawing.call(F.pad, x, flat, value=fill)
    for dim, (before, after) in before_after.items():
        if (before, after) != (0, 0):
            x = drawing.call(computing.pad_from_inside, x, dim, before, after, mode)
    return x


def _trilu(drawing: Drawing, op: Operator, x: Value, k: Value = None) -> Result:
    diagonal = 0 if k is None else drawing.numbers(k, "k")[0]
    return drawing.call(torch.triu if op.get("upper", 1) else torch.tril, x, diagonal)


def _depth_to_space(drawing: Drawing, op: Operator, x: Value) -> Result:
    return drawing.call(computing.depth_to_space, x, op.get("blocksize", 1), op.get("mode", "DCR"))


def _space_to_depth(drawing: Drawing, op: Operator, x: Value) -> Result:
    return drawing.call(computing.space_to_depth, x, op.get("blocksize", 1))


def _gather_elements(drawing: Drawing, op: Operator, x: Value, indices: Value) -> Result:
    return drawing.call(computing.gather_elements, x, indices, op.get("axis", 0))


def _gather_nd(drawing: Drawing, op: Operator, x: Value, indices: Value) -> Result:
    return drawing.call(computing.gather_nd, x, indices, op.get("batch_dims", 0))


def _scatter_elements(drawing: Drawing, op: Operator, x: Value, indices: Value, updates: Value) -> Result:
    return drawing.call(computing.scatter_elements, x, indices, updates, op.get("axis", 0), op.get("reduction", "none"))


def _scatter_nd(drawing: Drawing, op: Operator, x: Value, indices: Value, updates: Value) -> Result:
    if op.get("reduction", "none") not in ("none", "add"):
        raise UnsupportedOperatorError(f"reduction={op.get('reduction', '')!r} is not followed, only 'none' and 'add'")
    return drawing.call(computing.scatter_nd, x, indices, updates, op.get("reduction", "none") == "add")


def _one_hot(drawing: Drawing, op: Operator, indices: Value, depth: Value, values: Value) -> Result:
    count = int(drawing.numbers(depth, "depth")[0])
    return drawing.call(computing.one_hot, indices, count, values, op.get("axis", -1))


# ---- reductions


def _reduction(function: Callable[..., Any]) -> Function:
    def draw(drawing: Drawing, op: Operator, x: Value, axes: Value = None) -> Result:
        dims = op.get("axes", None) if axes is None else drawing.numbers(axes, "axes")
        if not dims:
            if op.get("noop_with_empty_axes", 0):
                return x if function in computing.PLAIN_REDUCTIONS else drawing.call(function, x, [], True)
            dims = range(drawing.rank(x))
        return drawing.call(function, x, list(dims), bool(op.get("keepdims", 1)))

    return draw


def _arg(function: Callable[..., Any]) -> Function:
    def draw(drawing: Drawing, op: Operator, x: Value) -> Result:
        op.allow(select_last_index=0)
        return drawing.call(function, x, op.get("axis", 0), bool(op.get("keepdims", 1)))

    return draw


def _cumsum(drawing: Drawing, op: Operator, x: Value, axis: Value) -> Result:
    dim = int(drawing.numbers(axis, "axis")[0])
    return drawing.call(computing.cumsum, x, dim, bool(op.get("exclusive", 0)), bool(op.get("reverse", 0)))


def _top_k(drawing: Drawing, op: Operator, x: Value, k: Value) -> Result:
    count = drawing.numbers(k, "k")[0]
    given = drawing.call(
        torch.topk, x, count, op.get("axis", -1), bool(op.get("largest", 1)), bool(op.get("sorted", 1))
    )
    return drawing.item(given, 0), drawing.item(given, 1)


def _softmax(function: Callable[..., Any]) -> Function:
    def draw(drawing: Drawing, op: Operator, x: Value) -> Result:
        if op.opset >= 13:
            return drawing.call(function, x, dim=op.get("axis", -1))
        axis = op.get("axis", 1) % drawing.rank(x)
        if axis == drawing.rank(x) - 1:
            return drawing.call(function, x, dim=-1)
        return drawing.call(computing.softmax_of_rows, x, axis, function is torch.log_softmax)

    return draw


# ---- layers


def _matmul(drawing: Drawing, op: Operator, x: Value, y: Value) -> Result:
    is_linear = isinstance(y, Tensor) and y.dim() == 2 and y.is_floating_point() and isinstance(x, fx.Node)
    if not is_linear or drawing.rank(x) < 2:
        return drawing.call(torch.matmul, x, y)
    assert isinstance(y, Tensor)
    return drawing.call_module(_linear(y.t()), drawing.name_of(y, op.name or "matmul"), x)


def _gemm(drawing: Drawing, op: Operator, a: Value, b: Value, c: Value = None) -> Result:
    alpha, beta = op.get("alpha", 1.0), op.get("beta", 1.0)
    a = drawing.call(torch.t, a) if op.get("transA", 0) else a
    is_plain = isinstance(b, Tensor) and b.is_floating_point() and alpha == 1 and isinstance(a, fx.Node)
    fits = c is None or (isinstance(c, Tensor) and c.dim() == 1 and beta == 1)
    if is_plain and fits:
        assert isinstance(b, Tensor)
        weight = b if op.get("transB", 0) else b.t()
        if c is None or (isinstance(c, Tensor) and c.shape[0] == weight.shape[0]):
            return drawing.call_module(_linear(weight, c), drawing.name_of(b, op.name or "gemm"), a)
    b = drawing.call(torch.t, b) if op.get("transB", 0) else b
    return drawing.call(computing.gemm, a, b, c, alpha, beta)


def _linear(weight_OI: Tensor, bias_O: Any = None) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
    layer.weight = nn.Parameter(weight_OI.contiguous())
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O)
    return layer


def _conv(drawing: Drawing, op: Operator, x: Value, weight: Value, bias: Value = None) -> Result:
    num_spatial = drawing.rank(x) - 2
    strides, dilations, group = _window(op, num_spatial)
    kernel = drawing.sample(weight).shape[2:]
    x, padding = _pad_window(drawing, op, x, list(kernel), strides, dilations, fill=0.0)
    known = isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    if known and isinstance(x, fx.Node) and num_spatial in (1, 2, 3):
        assert isinstance(weight, Tensor)
        layer = _conv_layer(weight, bias, strides, padding, dilations, group)
        return drawing.call_module(layer, drawing.name_of(weight, op.name or "conv"), x)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[num_spatial]
    return drawing.call(function, x, weight, bias, strides, padding, dilations, group)


def _conv_layer(
    weight: Tensor, bias: Any, strides: list[int], padding: list[int], dilations: list[int], group: int
) -> nn.Module:
    kinds: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    layer: nn.Module = kinds[weight.dim() - 2](
        weight.shape[1] * group,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(strides),
        tuple(padding),
        tuple(dilations),
        group,
        bias=bias is not None,
        device="meta",
    )
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _conv_transpose(drawing: Drawing, op: Operator, x: Value, weight: Value, bias: Value = None) -> Result:
    num_spatial = drawing.rank(x) - 2
    strides, dilations, group = _window(op, num_spatial)
    op.allow(auto_pad="NOTSET")
    pads = list(op.get("pads", [0] * 2 * num_spatial))
    before, after = pads[:num_spatial], pads[num_spatial:]
    extra = list(op.get("output_padding", [0] * num_spatial))
    if "output_shape" in op.attributes:
        raise UnsupportedOperatorError("output_shape is not followed, only pads")
    extra = [each + start - end for each, start, end in zip(extra, before, after, strict=True)]
    crop = [max(0, -each) for each in extra]
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[num_spatial]
    if all(each < max(stride, dilation) for each, stride, dilation in zip(extra, strides, dilations, strict=True)):
        padding = [max(0, each) for each in extra]
        y: Value = drawing.call(function, x, weight, bias, strides, before, padding, group, dilations)
    else:
        raise UnsupportedOperatorError("pads that differ by a stride or more are not followed")
    for dim, width in enumerate(crop, start=2):
        y = y if not width else drawing.call(operator.getitem, y, (*[slice(None)] * dim, slice(0, -width)))
    return y


def _window(op: Operator, num_spatial: int) -> tuple[list[int], list[int], int]:
    ones = [1] * num_spatial
    return list(op.get("strides", ones)), list(op.get("dilations", ones)), op.get("group", 1)


def _pad_window(
    drawing: Drawing,
    op: Operator,
    x: Value,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    *,
    fill: float,
) -> tuple[Value, list[int]]:
    """The input and the padding that torch's layer adds on both sides: what is not the same on both is added here."""
    num_spatial = len(kernel)
    auto_pad = op.get("auto_pad", "NOTSET")
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        is_upper = auto_pad == "SAME_UPPER"
        padded = drawing.call(computing.pad_same, x, kernel, strides, dilations, is_upper, fill)
        return padded, [0] * num_spatial
    pads = [0] * 2 * num_spatial if auto_pad == "VALID" else list(op.get("pads", [0] * 2 * num_spatial))
    before, after = pads[:num_spatial], pads[num_spatial:]
    if before == after and (fill == 0 or all(2 * pad <= size for pad, size in zip(before, kernel, strict=True))):
        return x, before
    flat = [width for pair in reversed(list(zip(before, after, strict=True))) for width in pair]
    return drawing.call(F.pad, x, flat, value=fill), [0] * num_spatial


def _max_pool(drawing: Drawing, op: Operator, x: Value) -> Result:
    if op.num_outputs > 1:
        raise UnsupportedOperatorError("the indices of a pooling are not followed")
    kernel = list(op.get("kernel_shape", []))
    strides, dilations, _ = _window(op, len(kernel))
    dtype = drawing.sample(x).dtype
    fill = -math.inf if dtype.is_floating_point else float(torch.iinfo(dtype).min)
    x, padding = _pad_window(drawing, op, x, kernel, strides, dilations, fill=fill)
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    return drawing.call(function, x, kernel, strides, padding, dilations, bool(op.get("ceil_mode", 0)))


def _average_pool(drawing: Drawing, op: Operator, x: Value) -> Result:
    kernel = list(op.get("kernel_shape", []))
    strides, dilations, _ = _window(op, len(kernel))
    if set(dilations) != {1}:
        raise UnsupportedOperatorError(f"dilations={dilations} are not followed, only 1")
    ceil, counts_padding = bool(op.get("ceil_mode", 0)), bool(op.get("count_include_pad", 0))
    original = x
    x, padding = _pad_window(drawing, op, x, kernel, strides, dilations, fill=0.0)
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    is_padded_here = x is not original
    if not is_padded_here and all(2 * pad <= size for pad, size in zip(padding, kernel, strict=True)):
        return drawing.call(function, x, kernel, strides, padding, ceil, counts_padding)
    if not is_padded_here:
        flat = [pad for pad in reversed(padding) for _ in range(2)]
        x = drawing.call(F.pad, x, flat)
    pooled = drawing.call(function, x, kernel, strides, 0, ceil, False)
    if counts_padding:
        return pooled
    ones = drawing.call(torch.ones_like, original)
    share, _ = _pad_window(drawing, op, ones, kernel, strides, dilations, fill=0.0)
    if not is_padded_here:
        share = drawing.call(F.pad, ones, flat)
    return drawing.call(torch.div, pooled, drawing.call(function, share, kernel, strides, 0, ceil, False))


def _global_pool(function: Callable[..., Any]) -> Function:
    def draw(drawing: Drawing, op: Operator, x: Value) -> Result:
        return drawing.call(function, x, list(range(2, drawing.rank(x))), True)

    return draw


def _batch_norm(
    drawing: Drawing, op: Operator, x: Value, scale: Value, shift: Value, mean: Value, variance: Value
) -> Result:
    if op.num_outputs > 1 or op.get("training_mode", 0):
        raise UnsupportedOperatorError("batch norm in training mode is not followed")
    parts = (scale, shift, mean, variance)
    eps, rank = op.get("epsilon", 1e-5), drawing.rank(x)
    if isinstance(x, fx.Node) and all(isinstance(each, Tensor) for each in parts) and 2 <= rank <= 5:
        kinds: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        layer = kinds[rank](drawing.sample(scale).shape[0], eps=eps, device="meta")
        layer.weight = nn.Parameter(drawing.constant(scale, "scale"))
        layer.bias = nn.Parameter(drawing.constant(shift, "shift"))
        layer.running_mean, layer.running_var = mean, variance
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        return drawing.call_module(layer, drawing.name_of(scale, op.name or "batch_norm"), x)
    return drawing.call(F.batch_norm, x, mean, variance, scale, shift, False, 0.0, eps)


def _layer_norm(drawing: Drawing, op: Operator, x: Value, scale: Value, shift: Value = None) -> Result:
    axis = op.get("axis", -1) % drawing.rank(x)
    eps, shape = op.get("epsilon", 1e-5), drawing.sample(x).shape[axis:]
    if op.num_outputs > 1:
        given = drawing.call(computing.layer_norm_with_statistics, x, axis, scale, shift, eps)
        return tuple(drawing.item(given, index) for index in range(op.num_outputs))
    known = isinstance(scale, Tensor) and scale.shape == shape and (shift is None or isinstance(shift, Tensor))
    if known and isinstance(x, fx.Node):
        layer = nn.LayerNorm(tuple(shape), eps=eps, bias=shift is not None, device="meta")
        layer.weight = nn.Parameter(drawing.constant(scale, "scale"))
        if shift is not None:
            layer.bias = nn.Parameter(drawing.constant(shift, "shift"))
        return drawing.call_module(layer, drawing.name_of(scale, op.name or "layer_norm"), x)
    return drawing.call(computing.layer_norm, x, axis, scale, shift, eps)


def _rms_norm(drawing: Drawing, op: Operator, x: Value, scale: Value) -> Result:
    axis = op.get("axis", -1) % drawing.rank(x)
    return drawing.call(computing.rms_norm, x, axis, scale, op.get("epsilon", 1e-5))


def _instance_norm(drawing: Drawing, op: Operator, x: Value, scale: Value, shift: Value) -> Result:
    return drawing.call(F.instance_norm, x, None, None, scale, shift, True, 0.0, op.get("epsilon", 1e-5))


def _group_norm(drawing: Drawing, op: Operator, x: Value, scale: Value, shift: Value) -> Result:
    if op.opset < 21:
        raise UnsupportedOperatorError("before opset 21 its scale was one number per group, which is not followed")
    return drawing.call(F.group_norm, x, op.get("num_groups", 1), scale, shift, op.get("epsilon", 1e-5))


def _einsum(drawing: Drawing, op: Operator, *values: Value) -> Result:
    return drawing.call(torch.einsum, op.get("equation", "").replace(" ", ""), *values)


def _resize(
    drawing: Drawing, op: Operator, x: Value, roi: Value = None, scales: Value = None, sizes: Value = None
) -> Result:
    op.allow(antialias=0, exclude_outside=0, keep_aspect_ratio_policy="stretch")
    mode, mapping = op.get("mode", "nearest"), op.get("coordinate_transformation_mode", "half_pixel")
    if mapping == "tf_crop_and_resize" or mapping not in resizing.MAPPINGS:
        raise UnsupportedOperatorError(f"coordinate_transformation_mode={mapping!r} is not followed")
    has_scales = scales is not None and (not isinstance(scales, Tensor) or scales.numel() > 0)
    wanted = drawing.numbers(scales if has_scales else sizes, "scales or sizes")
    rank = drawing.rank(x)
    axes = [axis % rank for axis in op.get("axes", range(rank))]
    how = (mode, mapping, op.get("nearest_mode", "round_prefer_floor"), op.get("cubic_coeff_a", -0.75))
    for axis, value in zip(axes, wanted, strict=True):
        is_same = value == 1 if has_scales else isinstance(value, int) and value == drawing.sample(x).shape[axis]
        if not (is_same and (has_scales or isinstance(x, Tensor))):
            x = drawing.call(resizing.resize_axis, x, axis, value, has_scales, *how)
    return x


# ---- quantized


def _quantize(drawing: Drawing, op: Operator, x: Value, scale: Value, zero: Value = None) -> Result:
    op.allow(block_size=0, output_dtype=0, precision=0)
    dtype = torch.uint8 if zero is None else drawing.sample(zero).dtype
    return drawing.call(computing.quantize, x, scale, zero, dtype, op.get("axis", 1))


def _dequantize(drawing: Drawing, op: Operator, x: Value, scale: Value, zero: Value = None) -> Result:
    op.allow(block_size=0, output_dtype=0)
    return drawing.call(computing.dequantize, x, scale, zero, op.get("axis", 1))


def _dynamic_quantize(drawing: Drawing, op: Operator, x: Value) -> Result:
    given = drawing.call(computing.quantize_dynamically, x)
    return tuple(drawing.item(given, index) for index in range(3))


def _matmul_integer(
    drawing: Drawing, op: Operator, a: Value, b: Value, a_zero: Value = None, b_zero: Value = None
) -> Result:
    return drawing.call(computing.matmul_integer, a, b, a_zero, b_zero)


def _qlinear_matmul(drawing: Drawing, op: Operator, *values: Value) -> Result:
    return drawing.call(computing.qlinear_matmul, *values)


def _conv_integer(
    drawing: Drawing, op: Operator, x: Value, weight: Value, x_zero: Value = None, w_zero: Value = None
) -> Result:
    centred = drawing.call(computing.centre, x, x_zero, 1)
    kernel = drawing.call(computing.centre, weight, w_zero, 0)
    return drawing.call(computing.cast, _conv(drawing, op, centred, kernel), torch.int32)


def _qlinear_conv(
    drawing: Drawing,
    op: Operator,
    x: Value,
    x_scale: Value,
    x_zero: Value,
    weight: Value,
    w_scale: Value,
    w_zero: Value,
    y_scale: Value,
    y_zero: Value,
    bias: Value = None,
) -> Result:
    centred = drawing.call(computing.centre, x, x_zero, 1)
    kernel = drawing.call(computing.centre, weight, w_zero, 0)
    shift = None if bias is None else drawing.call(computing.cast, bias, torch.float64)
    sums = _conv(drawing, op, centred, kernel, shift)
    return drawing.call(computing.requantize, sums, x_scale, w_scale, y_scale, y_zero, 1)


def _grid_sample(drawing: Drawing, op: Operator, x: Value, grid: Value) -> Result:
    names = {"linear": "bilinear", "cubic": "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
    mode = names.get(op.get("mode", "linear"), "nearest")
    if mode == "bicubic" and drawing.rank(x) != 4:
        raise UnsupportedOperatorError("cubic sampling is followed for pictures only")
    padding, aligned = op.get("padding_mode", "zeros"), bool(op.get("align_corners", 0))
    return drawing.call(F.grid_sample, x, grid, mode=mode, padding_mode=padding, align_corners=aligned)


def _lp_normalize(drawing: Drawing, op: Operator, x: Value) -> Result:
    return drawing.call(computing.lp_normalize, x, op.get("p", 2), op.get("axis", -1))


def _lrn(drawing: Drawing, op: Operator, x: Value) -> Result:
    settings = (op.get("alpha", 1e-4), op.get("beta", 0.75), op.get("bias", 1.0))
    return drawing.call(computing.local_response_norm, x, op.get("size", 1), *settings)


def _eye_like(drawing: Drawing, op: Operator, x: Value) -> Result:
    dtype = torch_dtype(op.get("dtype", 0)) if "dtype" in op.attributes else drawing.sample(x).dtype
    return drawing.call(computing.eye_like, x, op.get("k", 0), dtype)


# ---- the table

_ACTIVATIONS: dict[str, Function] = {
    "Relu": _unary(F.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Erf": _unary(torch.erf),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Mish": _unary(F.mish),
    "HardSwish": _unary(F.hardswish),
    "HardSigmoid": _activation(computing.hard_sigmoid, alpha=0.2, beta=0.5),
    "LeakyRelu": _activation(computing.leaky_relu, alpha=0.01),
    "Elu": _activation(F.elu, alpha=1.0),
    "Celu": _activation(F.celu, alpha=1.0),
    "Selu": _activation(computing.selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "ThresholdedRelu": _activation(computing.thresholded_relu, alpha=1.0),
    "Gelu": _gelu,
    "PRelu": _prelu,
    "Clip": _clip,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
}
_ARITHMETIC: dict[str, Function] = {
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Round": _unary(torch.round),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Tan": _unary(torch.tan),
    "Asin": _unary(torch.asin),
    "Acos": _unary(torch.acos),
    "Atan": _unary(torch.atan),
    "Sinh": _unary(torch.sinh),
    "Cosh": _unary(torch.cosh),
    "Asinh": _unary(torch.asinh),
    "Acosh": _unary(torch.acosh),
    "Atanh": _unary(torch.atanh),
    "Floor": _each_number(torch.floor, math.floor),
    "Ceil": _each_number(torch.ceil, math.ceil),
    "IsNaN": _unary(torch.isnan),
    "IsInf": _isinf,
    "Not": _each_number(torch.logical_not, operator.not_),
    "Add": _binary(torch.add, operator.add),
    "Sub": _binary(torch.sub, operator.sub),
    "Mul": _binary(torch.mul, operator.mul),
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Min": _variadic(torch.minimum, computing.smaller),
    "Max": _variadic(torch.maximum, computing.larger),
    "Sum": _variadic(torch.add, operator.add),
    "Mean": _mean,
    "And": _binary(torch.logical_and, computing.both),
    "Or": _binary(torch.logical_or, computing.either),
    "Xor": _binary(torch.logical_xor),
    "BitwiseAnd": _binary(torch.bitwise_and),
    "BitwiseOr": _binary(torch.bitwise_or),
    "BitwiseXor": _binary(torch.bitwise_xor),
    "BitwiseNot": _unary(torch.bitwise_not),
    "Equal": _equal,
    "Greater": _binary(torch.gt, operator.gt),
    "GreaterOrEqual": _binary(torch.ge, operator.ge),
    "Less": _binary(torch.lt, operator.lt),
    "LessOrEqual": _binary(torch.le, operator.le),
    "Where": _where,
    "Cast": _cast,
    "CastLike": _cast_like,
}
_SHAPES: dict[str, Function] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Shape": _shape,
    "Size": _size,
    "Identity": _identity,
    "Dropout": _dropout,
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
_REDUCTIONS: dict[str, Function] = {
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin),
    "ReduceProd": _reduction(computing.product),
    "ReduceL1": _reduction(computing.norm_1),
    "ReduceL2": _reduction(computing.norm_2),
    "ReduceSumSquare": _reduction(computing.sum_of_squares),
    "ReduceLogSum": _reduction(computing.log_of_sum),
    "ReduceLogSumExp": _reduction(computing.log_sum_exp),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumSum": _cumsum,
    "TopK": _top_k,
}
_LAYERS: dict[str, Function] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "ConvInteger": _conv_integer,
    "QLinearMatMul": _qlinear_matmul,
    "QLinearConv": _qlinear_conv,
    "GridSample": _grid_sample,
    "LpNormalization": _lp_normalize,
    "LRN": _lrn,
}
OPERATORS: dict[str, Function] = _ACTIVATIONS | _ARITHMETIC | _SHAPES | _REDUCTIONS | _LAYERS
