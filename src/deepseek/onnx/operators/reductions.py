"""Operators over an axis: sums, extremes, running sums, the largest few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepseek.onnx import functions
from deepseek.onnx.graph_builder import Drawing, Value
from deepseek.onnx.operators.node import Function, Operator, Result


def _reduction(function: Callable[..., Any]) -> Function:
    def draw(drawing: Drawing, op: Operator, x: Value, axes: Value = None) -> Result:
        dims = op.get("axes", None) if axes is None else drawing.numbers(axes, "axes")
        if not dims:
            if op.get("noop_with_empty_axes", 0):
                return x if function in functions.PLAIN_REDUCTIONS else drawing.call(function, x, [], True)
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
    return drawing.call(functions.cumsum, x, dim, bool(op.get("exclusive", 0)), bool(op.get("reverse", 0)))


def _top_k(drawing: Drawing, op: Operator, x: Value, k: Value) -> Result:
    count = drawing.numbers(k, "k")[0]
    given = drawing.call(
        torch.topk, x, count, op.get("axis", -1), bool(op.get("largest", 1)), bool(op.get("sorted", 1))
    )
    return drawing.item(given, 0), drawing.item(given, 1)


REDUCTIONS: dict[str, Function] = {
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin),
    "ReduceProd": _reduction(functions.product),
    "ReduceL1": _reduction(functions.norm_1),
    "ReduceL2": _reduction(functions.norm_2),
    "ReduceSumSquare": _reduction(functions.sum_of_squares),
    "ReduceLogSum": _reduction(functions.log_of_sum),
    "ReduceLogSumExp": _reduction(functions.log_sum_exp),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumSum": _cumsum,
    "TopK": _top_k,
}
