"""Operators that work element by element: activations, arithmetic, comparisons, casts.

Those that exporters use to compute shapes also work on `Lengths`, number by number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.onnx import functions
from deepseek.onnx.files import UnsupportedOperatorError, torch_dtype
from deepseek.onnx.graph_builder import GraphBuilder, Lengths, Value, as_lengths
from deepseek.onnx.operators.node import Operator, Result, Translator


def _unary(function: Callable[..., Any], **keywords: Any) -> Translator:
    def translate(builder: GraphBuilder, op: Operator, x: Value) -> Result:
        return builder.call(function, x, **keywords)

    return translate


def _activation(function: Callable[..., Any], **attributes: float) -> Translator:
    """Translate to a function whose keywords are attributes of ONNX; `attributes` are their defaults."""

    def translate(builder: GraphBuilder, op: Operator, x: Value) -> Result:
        return builder.call(function, x, **{name: op.get(name, default) for name, default in attributes.items()})

    return translate


def _celu(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    alpha = op.get("alpha", 1.0)
    if not alpha:
        raise UnsupportedOperatorError("alpha=0 is not followed, by which its formula divides")
    return builder.call(F.celu, x, alpha=alpha)


def _gelu(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    return builder.call(F.gelu, x, approximate=op.choose("approximate", "none", "tanh"))


def _identity(builder: GraphBuilder, op: Operator, x: Value, *_: Value) -> Result:
    return x


def _dropout(builder: GraphBuilder, op: Operator, x: Value, ratio: Value = None, training: Value = None) -> Result:
    if training is not None and bool(builder.constant(training, "training mode")):
        raise UnsupportedOperatorError("dropout that is active is not followed")
    return (x, builder.call(torch.ones_like, x, dtype=torch.bool)) if op.num_outputs > 1 else x


def _clip(builder: GraphBuilder, op: Operator, x: Value, low: Value = None, high: Value = None) -> Result:
    if low is None and high is None:
        return x
    bounds = [None if bound is None else _bound(builder, bound) for bound in (low, high)]
    return builder.call(torch.clamp, x, *bounds)


def _bound(builder: GraphBuilder, value: Value) -> Any:
    """Return a bound of Clip as a plain number where it is known, so that the call shows it."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else builder.tensor(value)


def _prelu(builder: GraphBuilder, op: Operator, x: Value, slope: Value) -> Result:
    return builder.call(functions.prelu, x, slope)


def _binary(function: Callable[..., Any], on_numbers: Callable[..., Any] | None = None) -> Translator:
    def translate(builder: GraphBuilder, op: Operator, x: Value, y: Value) -> Result:
        if on_numbers is not None and builder.is_lengths(x, y):
            return _by_number(builder, on_numbers, x, y)
        return builder.call(function, x, y)

    return translate


def _by_number(builder: GraphBuilder, function: Callable[..., Any], *values: Value) -> Value:
    """Apply `function` number by number over lengths; vectors of one number are repeated."""
    lists = [builder.numbers(value, "operand") for value in values]
    is_scalar = all(is_scalar_value(value) for value in values)
    longest = max(map(len, lists))
    if any(len(numbers) not in (1, longest) for numbers in lists):
        raise UnsupportedOperatorError("vectors of lengths that do not match are combined")
    rows = zip(*(numbers * longest if len(numbers) == 1 else numbers for numbers in lists), strict=True)
    return as_lengths((builder.call(function, *row) for row in rows), is_scalar=is_scalar)


def is_scalar_value(value: Value) -> bool:
    return value.is_scalar if isinstance(value, Lengths) else isinstance(value, Tensor) and value.dim() == 0


def _equal(builder: GraphBuilder, op: Operator, x: Value, y: Value) -> Result:
    if builder.is_lengths(x, y):
        return _equal_lengths(builder, x, y)
    return builder.call(torch.eq, x, y)


def _equal_lengths(builder: GraphBuilder, x: Value, y: Value) -> Value:
    """Compare lengths; none is negative, so `shape == -1`, which exporters write to expand, is known now."""
    lists = [builder.numbers(value, "operand") for value in (x, y)]
    longest = max(map(len, lists))
    pairs = zip(*(numbers * longest if len(numbers) == 1 else numbers for numbers in lists), strict=True)
    answers = [
        False if any(isinstance(number, int) and number < 0 for number in pair) else builder.call(operator.eq, *pair)
        for pair in pairs
    ]
    return as_lengths(answers, is_scalar=is_scalar_value(x) and is_scalar_value(y))


def _where(builder: GraphBuilder, op: Operator, condition: Value, x: Value, y: Value) -> Result:
    is_small = isinstance(condition, Lengths) or (isinstance(condition, Tensor) and condition.dim() < 2)
    if is_small and builder.is_lengths(condition, x, y):
        return _by_number(builder, functions.choose, condition, x, y)
    return builder.call(torch.where, condition, x, y)


def _variadic(function: Callable[..., Any], on_numbers: Callable[..., Any] | None = None) -> Translator:
    """Translate an operator of any number of inputs to a chain of `function`."""
    pair = _binary(function, on_numbers)

    def translate(builder: GraphBuilder, op: Operator, first: Value, *others: Value) -> Result:
        value: Any = first
        for other in others:
            value = pair(builder, op, value, other)
        return value

    return translate


def _mean(builder: GraphBuilder, op: Operator, *values: Value) -> Result:
    return builder.call(torch.div, _variadic(torch.add, operator.add)(builder, op, *values), len(values))


def _div(builder: GraphBuilder, op: Operator, x: Value, y: Value) -> Result:
    is_real = builder.sample(x).is_floating_point()
    if builder.is_lengths(x, y):
        return _by_number(builder, operator.truediv if is_real else operator.floordiv, x, y)
    return builder.call(torch.div, x, y, rounding_mode=None if is_real else "trunc")


def _mod(builder: GraphBuilder, op: Operator, x: Value, y: Value) -> Result:
    if builder.is_lengths(x, y):
        return _by_number(builder, operator.mod, x, y)
    return builder.call(torch.fmod if op.flag("fmod") else torch.remainder, x, y)


def _pow(builder: GraphBuilder, op: Operator, x: Value, y: Value) -> Result:
    exponent = y.item() if isinstance(y, Tensor) and y.numel() == 1 and y.dim() == 0 else y
    return builder.call(functions.power, x, exponent)


def _unary_or_numbers(function: Callable[..., Any], on_numbers: Callable[..., Any]) -> Translator:
    def translate(builder: GraphBuilder, op: Operator, x: Value) -> Result:
        if isinstance(x, Lengths):
            return _by_number(builder, on_numbers, x)
        return builder.call(function, x)

    return translate


def _cast(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    dtype = builder.dtype(torch_dtype(op.get("to", 0)))
    return _cast_to(builder, x, dtype)


def _cast_like(builder: GraphBuilder, op: Operator, x: Value, reference: Value) -> Result:
    return _cast_to(builder, x, builder.sample(reference).dtype)


def _cast_to(builder: GraphBuilder, x: Value, dtype: torch.dtype) -> Result:
    if isinstance(x, Lengths):
        kind = float if dtype.is_floating_point else bool if dtype is torch.bool else int
        return _by_number(builder, kind, x)
    if builder.sample(x).dtype is dtype:
        return x
    return builder.call(functions.cast, x, dtype)


def _isinf(builder: GraphBuilder, op: Operator, x: Value) -> Result:
    signs = (op.flag("detect_negative", True), op.flag("detect_positive", True))
    tests = {(True, True): torch.isinf, (True, False): torch.isneginf, (False, True): torch.isposinf}
    return builder.call(tests.get(signs, functions.nowhere), x)


def _softmax(function: Callable[..., Any]) -> Translator:
    def translate(builder: GraphBuilder, op: Operator, x: Value) -> Result:
        if op.opset >= 13:
            axis, rank = op.get("axis", -1), builder.rank(x)
            if not -max(rank, 1) <= axis < max(rank, 1):
                raise UnsupportedOperatorError(f"axis={axis} is none of its {rank} dimensions")
            return builder.call(function, x, dim=axis)
        axis = op.get("axis", 1) % builder.rank(x)
        if axis == builder.rank(x) - 1:
            return builder.call(function, x, dim=-1)
        return builder.call(functions.softmax_of_rows, x, axis, function is torch.log_softmax)

    return translate


ELEMENTWISE: dict[str, Translator] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Relu": _unary(F.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Erf": _unary(torch.erf),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Mish": _unary(F.mish),
    "HardSwish": _unary(F.hardswish),
    "HardSigmoid": _activation(functions.hard_sigmoid, alpha=0.2, beta=0.5),
    "LeakyRelu": _activation(functions.leaky_relu, alpha=0.01),
    "Elu": _activation(F.elu, alpha=1.0),
    "Celu": _celu,
    "Selu": _activation(functions.selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "ThresholdedRelu": _activation(functions.thresholded_relu, alpha=1.0),
    "Gelu": _gelu,
    "PRelu": _prelu,
    "Clip": _clip,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
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
    "Floor": _unary_or_numbers(torch.floor, math.floor),
    "Ceil": _unary_or_numbers(torch.ceil, math.ceil),
    "IsNaN": _unary(torch.isnan),
    "IsInf": _isinf,
    "Not": _unary_or_numbers(torch.logical_not, operator.not_),
    "Add": _binary(torch.add, operator.add),
    "Sub": _binary(torch.sub, operator.sub),
    "Mul": _binary(torch.mul, operator.mul),
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Min": _variadic(torch.minimum, functions.smaller),
    "Max": _variadic(torch.maximum, functions.larger),
    "Sum": _variadic(torch.add, operator.add),
    "Mean": _mean,
    "And": _binary(torch.logical_and, functions.both),
    "Or": _binary(torch.logical_or, functions.either),
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
