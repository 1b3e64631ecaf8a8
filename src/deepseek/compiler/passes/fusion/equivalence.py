"""Whether new nodes compute what the old ones did, in numbers.

Both run on the same random input of the shape that arrives there. The reference is the old nodes in float64. The new
nodes must be as near to it as their precision allows, and their stored weights must be right by themselves: where the
operators exist in float64, the new nodes run there too, so that only the rounding of folded weights remains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from deepseek.compiler.passes.fusion.graphs import ProposedRewrite, Rewriting, read_attribute, to_float64

# Largest deviation in units of the dtype's rounding step, relative to the largest value. Sums over thousands of
# products leave 10 to 40 in FP32; a weight folded wrongly leaves millions.
_ALLOWED_STEPS = 256
_SMALLEST_ALLOWED = 1e-12
_NUM_EXAMPLES = 2
_SEED = 20


@dataclass(frozen=True)
class Equivalence:
    """Measured errors, relative to the largest value of the reference."""

    error: float
    """Of the new nodes as they run."""
    weight_error: float | None
    """Of the new nodes in float64, which is that of their weights; none where they have no such form."""
    bound: float
    """The error that was allowed."""

    @property
    def is_right(self) -> bool:
        """Return whether both errors are numbers within the bound."""
        return self.error <= self.bound and (self.weight_error is None or self.weight_error <= self.bound)


def compare(candidate: ProposedRewrite, results: Sequence[Node], graph: Rewriting) -> Equivalence:
    """Run what a candidate replaces and what it emitted."""
    sample = _draw_sample(candidate, graph)
    emitted = graph.emitted
    reference = _run(candidate.replaced, sample, graph, candidate.results, is_exact=True)
    before = _run(candidate.replaced, sample, graph, candidate.results, is_exact=False)
    after = _run(emitted, sample, graph, results, is_exact=False)
    dtype = after[0].dtype
    steps = float(torch.finfo(dtype).eps) * _ALLOWED_STEPS if dtype.is_floating_point else 0.0
    error_before = _error(before, reference)
    bound = max(steps, 2 * error_before if math.isfinite(error_before) else 0.0, _SMALLEST_ALLOWED)
    return Equivalence(_error(after, reference), _compare_weights(emitted, results, sample, graph, reference), bound)


def _compare_weights(
    emitted: Sequence[Node],
    results: Sequence[Node],
    sample: dict[Node, Tensor],
    graph: Rewriting,
    expected: list[Tensor],
) -> float | None:
    if any("mkldnn" in str(node.target) for node in emitted):
        return None
    return _error(_run(emitted, sample, graph, results, is_exact=True), expected)


def _draw_sample(candidate: ProposedRewrite, graph: Rewriting) -> dict[Node, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    sample = {}
    for node in candidate.inputs:
        value = graph.values[node]
        shape = list(value.shape)
        if candidate.has_batch and len(shape) > 1:
            shape[0] = min(shape[0], _NUM_EXAMPLES)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
        sample[node] = drawn.to(device=value.device, dtype=value.dtype)
    return sample


@torch.no_grad()
def _run(
    nodes: Iterable[Node], sample: dict[Node, Tensor], graph: Rewriting, results: Sequence[Node], *, is_exact: bool
) -> list[Tensor]:
    """Return the values of `results` after `nodes`, in float64 where `is_exact`."""
    known: dict[Node, Any] = {}
    for node, value in sample.items():
        known[node] = to_float64(value) if is_exact else value.clone()

    def find(node: Node) -> Any:
        if node not in known:
            known[node] = _compute(node)
        return known[node]

    def _compute(node: Node) -> Any:
        if node.op in ("get_attr", "placeholder"):
            is_bound = node in graph.bound
            constant = graph.bound[node] if is_bound else read_attribute(graph.graph_module, str(node.target))
            return to_float64(constant) if is_exact else constant
        assert callable(node.target)
        return node.target(*map_arg(node.args, find), **map_arg(node.kwargs, find))

    for node in nodes:
        find(node)
    return [find(node) for node in results]


def _error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest deviation relative to the largest expected value; infinite where something is not a number."""
    worst = 0.0
    for value, wanted in zip(values, expected, strict=True):
        difference = (to_float64(value) - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo().tiny)
        worst = max(worst, float(difference) if bool(difference.isfinite()) else float("inf"))
    return worst
