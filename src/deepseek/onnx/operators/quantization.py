"""Operators on whole-number steps with a scale: quantizing, dequantizing, and matmuls and convolutions of steps.

Products are summed in doubles, which hold every sum of products of bytes exactly, so the only roundings are ONNX's own.
"""

from __future__ import annotations

import torch

from deepseek.onnx import functions
from deepseek.onnx.graph_builder import GraphBuilder, Value
from deepseek.onnx.operators.layers import translate_conv
from deepseek.onnx.operators.node import Operator, Result, Translator


def _quantize(builder: GraphBuilder, op: Operator, x: Value, scale: Value, zero: Value = None) -> Result:
    op.allow(block_size=0, output_dtype=0, precision=0)
    dtype = torch.uint8 if zero is None else builder.sample(zero).dtype
    return builder.call(functions.quantize, x, scale, zero, dtype, op.get("axis", 1))


def _dequantize(builder: GraphBuilder, op: Operator, x: Value, scale: Value, zero: Value = None) -> Result:
    op.allow(block_size=0, output_dtype=0)
    return builder.call(functions.dequantize, x, scale, zero, op.get("axis", 1))


def _dynamic_quantize(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    given = builder.call(functions.quantize_dynamically, x)
    return tuple(builder.item(given, index) for index in range(3))


def _matmul_integer(
    builder: GraphBuilder, op: Operator, a: Value, b: Value, a_zero: Value = None, b_zero: Value = None
) -> Result:
    return builder.call(functions.matmul_integer, a, b, a_zero, b_zero)


def _qlinear_matmul(builder: GraphBuilder, op: Operator, *values: Value) -> Result:
    return builder.call(functions.qlinear_matmul, *values)


def _conv_integer(
    builder: GraphBuilder, op: Operator, x: Value, weight: Value, x_zero: Value = None, w_zero: Value = None
) -> Result:
    centered = builder.call(functions.center, x, x_zero, 1)
    kernel = builder.call(functions.center, weight, w_zero, 0)
    return builder.call(functions.cast, translate_conv(builder, op, centered, kernel), torch.int32)


def _qlinear_conv(
    builder: GraphBuilder,
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
    centered = builder.call(functions.center, x, x_zero, 1)
    kernel = builder.call(functions.center, weight, w_zero, 0)
    shift = None if bias is None else builder.call(functions.cast, bias, torch.float64)
    sums = translate_conv(builder, op, centered, kernel, shift)
    return builder.call(functions.requantize, sums, x_scale, w_scale, y_scale, y_zero, 1)


QUANTIZED: dict[str, Translator] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "ConvInteger": _conv_integer,
    "QLinearMatMul": _qlinear_matmul,
    "QLinearConv": _qlinear_conv,
}
