"""Operators over an axis: sums, extremes, running sums, the largest few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepseek.onnx import functions
from deepseek.onnx.graph_builder import GraphBuilder, Value
from deepseek.onnx.operators.node import Operator, Result, Translator


def _reduction(function: Callable[..., Any]) -> Translator:
    def translate(builder: GraphBuilder, op: Operator, x: Value, axes: Value = None) -> Result:
        keeps_dims, is_noop = op.flag("keepdims", True), op.flag("noop_with_empty_axes")
        dims = op.get("axes", None) if axes is None else builder.numbers(axes, "axes")
        if not dims:
            if is_noop:
                return x if function in functions.PLAIN_REDUCTIONS else builder.call(function, x, [], True)
            dims = range(builder.rank(x))
        return builder.call(function, x, list(dims), keeps_dims)

    return translate


def _arg(*, is_max: bool) -> Translator:
    def translate(builder: GraphBuilder, op: Operator, x: Value) -> Result:
        is_last = op.flag("select_last_index")
        return builder.call(functions.arg_extreme, x, op.get("axis", 0), op.flag("keepdims", True), is_max, is_last)

    return translate


def _running(function: Callable[..., Any]) -> Translator:
    def translate(builder: GraphBuilder, op: Operator, x: Value, axis: Value) -> Result:
        dim = int(builder.numbers(axis, "axis")[0])
        return builder.call(function, x, dim, op.flag("exclusive"), op.flag("reverse"))

    return translate


def _top_k(builder: GraphBuilder, op: Operator, x: Value, k: Value) -> Result:
    count = builder.numbers(k, "k")[0]
    op.get("sorted", 1)  # sorted is one of the orders that unsorted allows
    given = builder.call(functions.top_k, x, count, op.get("axis", -1), op.flag("largest", True))
    return builder.item(given, 0), builder.item(given, 1)


REDUCTIONS: dict[str, Translator] = {
    "ReduceMean": _reduction(functions.mean),
    "ReduceSum": _reduction(functions.total),
    "ReduceMax": _reduction(functions.largest),
    "ReduceMin": _reduction(functions.smallest),
    "ReduceProd": _reduction(functions.product),
    "ReduceL1": _reduction(functions.norm_1),
    "ReduceL2": _reduction(functions.norm_2),
    "ReduceSumSquare": _reduction(functions.sum_of_squares),
    "ReduceLogSum": _reduction(functions.log_of_sum),
    "ReduceLogSumExp": _reduction(functions.log_sum_exp),
    "ArgMax": _arg(is_max=True),
    "ArgMin": _arg(is_max=False),
    "CumSum": _running(functions.cumsum),
    "CumProd": _running(functions.cumprod),
    "TopK": _top_k,
}
