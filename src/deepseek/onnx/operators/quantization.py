"""Operators on whole-number steps with a scale: quantizing, back again, and products of steps.

Products are summed in doubles, which hold every sum of products of bytes exactly, so the only roundings are ONNX's own.
"""

from __future__ import annotations

import torch

from deepseek.onnx import functions
from deepseek.onnx.graph_builder import Drawing, Value
from deepseek.onnx.operators.layers import draw_conv
from deepseek.onnx.operators.node import Function, Operator, Result


def _quantize(drawing: Drawing, op: Operator, x: Value, scale: Value, zero: Value = None) -> Result:
    op.allow(block_size=0, output_dtype=0, precision=0)
    dtype = torch.uint8 if zero is None else drawing.sample(zero).dtype
    return drawing.call(functions.quantize, x, scale, zero, dtype, op.get("axis", 1))


def _dequantize(drawing: Drawing, op: Operator, x: Value, scale: Value, zero: Value = None) -> Result:
    op.allow(block_size=0, output_dtype=0)
    return drawing.call(functions.dequantize, x, scale, zero, op.get("axis", 1))


def _dynamic_quantize(drawing: Drawing, op: Operator, x: Value) -> Result:
    given = drawing.call(functions.quantize_dynamically, x)
    return tuple(drawing.item(given, index) for index in range(3))


def _matmul_integer(
    drawing: Drawing, op: Operator, a: Value, b: Value, a_zero: Value = None, b_zero: Value = None
) -> Result:
    return drawing.call(functions.matmul_integer, a, b, a_zero, b_zero)


def _qlinear_matmul(drawing: Drawing, op: Operator, *values: Value) -> Result:
    return drawing.call(functions.qlinear_matmul, *values)


def _conv_integer(
    drawing: Drawing, op: Operator, x: Value, weight: Value, x_zero: Value = None, w_zero: Value = None
) -> Result:
    centred = drawing.call(functions.centre, x, x_zero, 1)
    kernel = drawing.call(functions.centre, weight, w_zero, 0)
    return drawing.call(functions.cast, draw_conv(drawing, op, centred, kernel), torch.int32)


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
    centred = drawing.call(functions.centre, x, x_zero, 1)
    kernel = drawing.call(functions.centre, weight, w_zero, 0)
    shift = None if bias is None else drawing.call(functions.cast, bias, torch.float64)
    sums = draw_conv(drawing, op, centred, kernel, shift)
    return drawing.call(functions.requantize, sums, x_scale, w_scale, y_scale, y_zero, 1)


QUANTIZED: dict[str, Function] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "ConvInteger": _conv_integer,
    "QLinearMatMul": _qlinear_matmul,
    "QLinearConv": _qlinear_conv,
}
