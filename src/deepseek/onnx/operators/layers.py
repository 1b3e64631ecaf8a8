"""Operators that have weights or windows: matmuls, convolutions, pooling, norms.

Where the weights are known they become modules of torch, which passes over graphs look for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deepseek.onnx import functions, pool_windows
from deepseek.onnx.files import UnsupportedOperatorError
from deepseek.onnx.graph_builder import GraphBuilder, Value
from deepseek.onnx.operators.node import Operator, Result, Translator


def _matmul(builder: GraphBuilder, op: Operator, x: Value, y: Value) -> Result:
    is_linear = isinstance(y, Tensor) and y.dim() == 2 and y.is_floating_point() and isinstance(x, fx.Node)
    if not is_linear or builder.rank(x) < 2:
        return builder.call(torch.matmul, x, y)
    assert isinstance(y, Tensor)
    return builder.call_module(_linear(y.t()), builder.name_of(y, op.name or "matmul"), x)


def _gemm(builder: GraphBuilder, op: Operator, a: Value, b: Value, c: Value = None) -> Result:
    alpha, beta = op.get("alpha", 1.0), op.get("beta", 1.0)
    a = builder.call(torch.t, a) if op.flag("transA") else a
    is_plain = isinstance(b, Tensor) and b.is_floating_point() and alpha == 1 and isinstance(a, fx.Node)
    fits = c is None or (isinstance(c, Tensor) and c.dim() == 1 and beta == 1)
    if is_plain and fits:
        assert isinstance(b, Tensor)
        weight = b if op.flag("transB") else b.t()
        if c is None or (isinstance(c, Tensor) and c.shape[0] == weight.shape[0]):
            return builder.call_module(_linear(weight, c), builder.name_of(b, op.name or "gemm"), a)
    b = builder.call(torch.t, b) if op.flag("transB") else b
    return builder.call(functions.gemm, a, b, c, alpha, beta)


def _linear(weight_OI: Tensor, bias_O: Any = None) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
    layer.weight = nn.Parameter(weight_OI.contiguous())
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O)
    return layer


def translate_conv(builder: GraphBuilder, op: Operator, x: Value, weight: Value, bias: Value = None) -> Result:
    num_spatial = builder.rank(x) - 2
    strides, dilations, group = _window(op, num_spatial)
    kernel = builder.sample(weight).shape[2:]
    x, padding = _pad_window(builder, op, x, list(kernel), strides, dilations, fill=0.0)
    known = isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    if known and isinstance(x, fx.Node) and num_spatial in (1, 2, 3):
        assert isinstance(weight, Tensor)
        layer = _conv_layer(weight, bias, strides, padding, dilations, group)
        return builder.call_module(layer, builder.name_of(weight, op.name or "conv"), x)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[num_spatial]
    return builder.call(function, x, weight, bias, strides, padding, dilations, group)


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


def _conv_transpose(builder: GraphBuilder, op: Operator, x: Value, weight: Value, bias: Value = None) -> Result:
    num_spatial = builder.rank(x) - 2
    strides, dilations, group = _window(op, num_spatial)
    op.allow(auto_pad="NOTSET")
    pads = _pads(op, num_spatial)
    before, after = pads[:num_spatial], pads[num_spatial:]
    extra = list(op.get("output_padding", [0] * num_spatial))
    if "output_shape" in op.attributes:
        raise UnsupportedOperatorError("output_shape is not followed, only pads")
    extra = [width + start - end for width, start, end in zip(extra, before, after, strict=True)]
    crop = [max(0, -width) for width in extra]
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[num_spatial]
    if all(width < max(step, gap) for width, step, gap in zip(extra, strides, dilations, strict=True)):
        padding = [max(0, width) for width in extra]
        y: Value = builder.call(function, x, weight, bias, strides, before, padding, group, dilations)
    else:
        raise UnsupportedOperatorError("pads that differ by a stride or more are not followed")
    for dim, width in enumerate(crop, start=2):
        y = y if not width else builder.call(operator.getitem, y, (*[slice(None)] * dim, slice(0, -width)))
    return y


def _window(op: Operator, num_spatial: int) -> tuple[list[int], list[int], int]:
    """Return strides, dilations and groups; raise where there are not as many as the window has dimensions."""
    if num_spatial not in (1, 2, 3):
        raise UnsupportedOperatorError(f"windows of {num_spatial} dimensions are not followed, only of 1 to 3")
    ones = [1] * num_spatial
    strides, dilations, group = list(op.get("strides", ones)), list(op.get("dilations", ones)), op.get("group", 1)
    for name, numbers in (("strides", strides), ("dilations", dilations)):
        if len(numbers) != num_spatial or min(numbers) < 1:
            raise UnsupportedOperatorError(f"{name}={numbers} are not {num_spatial} positive numbers")
    return strides, dilations, group


_AUTO_PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


def _pads(op: Operator, num_spatial: int) -> list[int]:
    pads = list(op.get("pads", [0] * 2 * num_spatial))
    if len(pads) != 2 * num_spatial:
        raise UnsupportedOperatorError(f"pads={pads} are not two for each of {num_spatial} dimensions")
    return pads


def _pad_window(
    builder: GraphBuilder,
    op: Operator,
    x: Value,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    *,
    fill: float,
) -> tuple[Value, list[int]]:
    """Return the input and the padding that torch adds on both sides; what differs between the sides is added here."""
    num_spatial = len(kernel)
    auto_pad = op.choose("auto_pad", *_AUTO_PADS)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        is_upper = auto_pad == "SAME_UPPER"
        padded = builder.call(functions.pad_same, x, kernel, strides, dilations, is_upper, fill)
        return padded, [0] * num_spatial
    pads = [0] * 2 * num_spatial if auto_pad == "VALID" else _pads(op, num_spatial)
    before, after = pads[:num_spatial], pads[num_spatial:]
    if before == after and (fill == 0 or all(2 * pad <= size for pad, size in zip(before, kernel, strict=True))):
        return x, before
    flat = [width for pair in reversed(list(zip(before, after, strict=True))) for width in pair]
    return builder.call(F.pad, x, flat, value=fill), [0] * num_spatial


def _max_pool(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    if op.num_outputs > 1:
        raise UnsupportedOperatorError("the indices of a pooling are not followed")
    window = _pool_window(op)
    if window.is_plain and builder.sample(x).is_floating_point():
        function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(window.kernel)]
        plain = (list(window.kernel), list(window.strides), list(window.before), list(window.dilations))
        return builder.call(function, x, *plain, window.is_ceil)
    return builder.call(pool_windows.max_pool, x, window)


def _average_pool(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    window, counts_padding = _pool_window(op), op.flag("count_include_pad")
    if window.is_plain and set(window.dilations) == {1}:
        function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(window.kernel)]
        plain = (list(window.kernel), list(window.strides), list(window.before))
        return builder.call(function, x, *plain, window.is_ceil, counts_padding)
    return builder.call(pool_windows.average_pool, x, window, counts_padding)


def _lp_pool(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    return builder.call(pool_windows.lp_pool, x, _pool_window(op), _norm_power(op))


def _norm_power(op: Operator) -> int:
    power = op.get("p", 2)
    if power < 1:
        raise UnsupportedOperatorError(f"p={power} is not followed, only 1 and more")
    return int(power)


def _pool_window(op: Operator) -> pool_windows.PoolWindow:
    kernel = tuple(op.get("kernel_shape", ()))
    strides, dilations, _ = _window(op, len(kernel))
    pads, auto_pad = tuple(_pads(op, len(kernel))), op.choose("auto_pad", *_AUTO_PADS)
    if min(kernel) < 1 or min(pads) < 0:
        raise UnsupportedOperatorError(f"a window of {list(kernel)} with pads={list(pads)} is not followed")
    pads = pads if auto_pad == "NOTSET" else (0,) * 2 * len(kernel)
    return pool_windows.PoolWindow(
        kernel,
        tuple(strides),
        tuple(dilations),
        pads[: len(kernel)],
        pads[len(kernel) :],
        auto_pad if auto_pad.startswith("SAME") else "",
        op.flag("ceil_mode"),
    )


def _global_pool(function: Callable[..., Any]) -> Translator:
    def translate(builder: GraphBuilder, op: Operator, x: Value) -> Result:
        return builder.call(function, x, list(range(2, builder.rank(x))), True)

    return translate


def _global_lp_pool(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    return builder.call(pool_windows.lp_norm, x, list(range(2, builder.rank(x))), _norm_power(op))


def _batch_norm(
    builder: GraphBuilder, op: Operator, x: Value, scale: Value, shift: Value, mean: Value, variance: Value
) -> Result:
    if op.num_outputs > 1 or op.get("training_mode", 0):
        raise UnsupportedOperatorError("batch norm in training mode is not followed")
    parts = (scale, shift, mean, variance)
    eps, rank = op.get("epsilon", 1e-5), builder.rank(x)
    if isinstance(x, fx.Node) and all(isinstance(part, Tensor) for part in parts) and 2 <= rank <= 5:
        kinds: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        layer = kinds[rank](builder.sample(scale).shape[0], eps=eps, device="meta")
        layer.weight = nn.Parameter(builder.constant(scale, "scale"))
        layer.bias = nn.Parameter(builder.constant(shift, "shift"))
        # Copies: a file may store both once, and buffers that are one tensor are not told apart.
        layer.running_mean = builder.constant(mean, "mean").clone()
        layer.running_var = builder.constant(variance, "variance").clone()
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        return builder.call_module(layer, builder.name_of(scale, op.name or "batch_norm"), x)
    return builder.call(F.batch_norm, x, mean, variance, scale, shift, False, 0.0, eps)


def _layer_norm(builder: GraphBuilder, op: Operator, x: Value, scale: Value, shift: Value = None) -> Result:
    axis = op.get("axis", -1) % builder.rank(x)
    eps, shape = op.get("epsilon", 1e-5), builder.sample(x).shape[axis:]
    _check_broadcast(shape, *(builder.sample(part).shape for part in (scale, shift) if part is not None))
    if op.num_outputs > 1:
        given = builder.call(functions.layer_norm_with_statistics, x, axis, scale, shift, eps)
        return tuple(builder.item(given, index) for index in range(op.num_outputs))
    known = isinstance(scale, Tensor) and scale.shape == shape and (shift is None or isinstance(shift, Tensor))
    if known and isinstance(x, fx.Node):
        layer = nn.LayerNorm(tuple(shape), eps=eps, bias=shift is not None, device="meta")
        layer.weight = nn.Parameter(builder.constant(scale, "scale"))
        if shift is not None:
            layer.bias = nn.Parameter(builder.constant(shift, "shift"))
        return builder.call_module(layer, builder.name_of(scale, op.name or "layer_norm"), x)
    return builder.call(functions.layer_norm, x, axis, scale, shift, eps)


def _check_broadcast(shape: torch.Size, *others: torch.Size) -> None:
    """Raise unless `others` are broadcast to `shape`, which torch would broadcast to them, too."""
    for other in others:
        if torch.broadcast_shapes(shape, other) != shape:
            raise ValueError(f"a scale or shift of shape {tuple(other)} does not fit values of shape {tuple(shape)}")


def _rms_norm(builder: GraphBuilder, op: Operator, x: Value, scale: Value) -> Result:
    axis = op.get("axis", -1) % builder.rank(x)
    _check_broadcast(builder.sample(x).shape[axis:], builder.sample(scale).shape)
    return builder.call(functions.rms_norm, x, axis, scale, op.get("epsilon", 1e-5))


def _instance_norm(builder: GraphBuilder, op: Operator, x: Value, scale: Value, shift: Value) -> Result:
    return builder.call(F.instance_norm, x, None, None, scale, shift, True, 0.0, op.get("epsilon", 1e-5))


def _group_norm(builder: GraphBuilder, op: Operator, x: Value, scale: Value, shift: Value) -> Result:
    if op.opset < 21:
        raise UnsupportedOperatorError("before opset 21 its scale was one number per group, which is not followed")
    return builder.call(F.group_norm, x, op.get("num_groups", 1), scale, shift, op.get("epsilon", 1e-5))


def _einsum(builder: GraphBuilder, op: Operator, *values: Value) -> Result:
    return builder.call(torch.einsum, op.get("equation", "").replace(" ", ""), *values)


def _grid_sample(builder: GraphBuilder, op: Operator, x: Value, grid: Value) -> Result:
    mode = op.choose("mode", "linear", "bilinear", "cubic", "bicubic", "nearest")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    ranks = (builder.rank(x), builder.rank(grid))
    if ranks not in ((4, 4), (5, 5)) or (mode == "bicubic" and ranks != (4, 4)):
        kinds = "images" if mode == "bicubic" else "images and volumes"
        raise UnsupportedOperatorError(f"inputs of {ranks[0]} and {ranks[1]} dimensions are not followed, only {kinds}")
    padding, aligned = op.choose("padding_mode", "zeros", "border", "reflection"), op.flag("align_corners")
    return builder.call(F.grid_sample, x, grid, mode=mode, padding_mode=padding, align_corners=aligned)


def _lp_normalize(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    return builder.call(functions.lp_normalize, x, op.get("p", 2), op.get("axis", -1))


def _lrn(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    settings = (op.get("alpha", 1e-4), op.get("beta", 0.75), op.get("bias", 1.0))
    return builder.call(functions.local_response_norm, x, op.get("size", 1), *settings)


LAYERS: dict[str, Translator] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Conv": translate_conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "LpPool": _lp_pool,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "GlobalLpPool": _global_lp_pool,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "GridSample": _grid_sample,
    "LpNormalization": _lp_normalize,
    "LRN": _lrn,
}
