"""Operators that follow each other become one: a table of rewrite rules, each verified where it is applied.

    fused = fuse(model.eval(), (images,))     # from a model
    graph_module, report = fuse_graph(...)    # from a captured graph; `optimizing.py` calls this one

Each row of `RULES` looks at one node and proposes. The driver lets it write the new nodes beside the old ones, runs
both on random input of the shape that arrives there (`equivalence.py`), and keeps the new ones only where they are as
near to float64 as their precision allows; otherwise the graph stays as it was and the report says why. Nothing is fused
in training: a folded weight would not be trained any more, and statistics of the batch cannot be folded.

Measured on one Zen 4 core, batch 1, eager: see docs/guide/graphs.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from deepseek.compiler.passes.effects import find_line, is_computation
from deepseek.compiler.passes.fusion.batch_norm import match_convolution_batch_norm, match_linear_batch_norm
from deepseek.compiler.passes.fusion.equivalence import compare
from deepseek.compiler.passes.fusion.graphs import (
    Kernels,
    Match,
    ProposedRewrite,
    Refusal,
    Rewriting,
    read_attribute,
    why_not_movable,
)
from deepseek.compiler.passes.fusion.kernels import (
    match_convolution,
    match_convolution_activation,
    match_convolution_add_activation,
    match_linear_activation,
)
from deepseek.compiler.passes.fusion.linear_layers import (
    match_consecutive_linears,
    match_identity,
    match_parallel_linears,
)
from deepseek.compiler.passes.shape_inference import observe, stand_in
from deepseek.core.errors import ConfigError

IN_TRAINING = "weights are trained and statistics are those of the batch: nothing may be folded or merged"


@dataclass(frozen=True)
class FusionRule:
    """One row of the table."""

    name: str
    match: Callable[[Node, Rewriting], Match]


# In this order: what folds weights first, what chooses kernels last.
RULES = (
    FusionRule("dropout in evaluation", match_identity),
    FusionRule("convolution + batch norm", match_convolution_batch_norm),
    FusionRule("linear + batch norm", match_linear_batch_norm),
    FusionRule("linear + linear", match_consecutive_linears),
    FusionRule("linear beside linear", match_parallel_linears),
    FusionRule("convolution + add + activation", match_convolution_add_activation),
    FusionRule("convolution + activation", match_convolution_activation),
    FusionRule("linear + activation", match_linear_activation),
    FusionRule("convolution, weights laid out", match_convolution),
)


@dataclass(frozen=True)
class Fusion:
    """A rule that fired."""

    rule: str
    where: str
    """file:line of the last of the nodes, where it is known."""
    nodes: tuple[str, ...]
    """Names of the nodes that were replaced."""
    max_error: float
    """Largest deviation from float64 that was measured, relative to the largest value."""


@dataclass(frozen=True)
class RefusedFusion:
    """A rule that could have fired and did not."""

    rule: str
    where: str
    nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """The fusions of a graph, done and refused."""

    fusions: tuple[Fusion, ...]
    rejections: tuple[RefusedFusion, ...]
    num_operators_before: int
    num_operators_after: int

    def __str__(self) -> str:
        lines = [f"{self.num_operators_before} operators became {self.num_operators_after}"]
        lines += [f"  {fusion.rule} at {fusion.where}: error {fusion.max_error:.1e}" for fusion in self.fusions]
        lines += [f"  not {rejection.rule} at {rejection.where}: {rejection.reason}" for rejection in self.rejections]
        return "\n".join(lines)


@dataclass(frozen=True)
class Fused:
    """A graph that computes what another did, with fewer operators."""

    graph_module: fx.GraphModule
    report: FusionReport


def fuse(
    model: nn.Module, example_inputs: Sequence[Any], *, kernels: Kernels = "eager", rules: Sequence[FusionRule] = RULES
) -> Fused:
    """Capture `model` for inference and fuse its operators.

    `example_inputs` is the tuple of positional arguments; batches of other sizes need `optimize` on a graph captured
    with dynamic shapes. `kernels` says who will run the graph: `eager`, operator by operator, or `inductor`, which
    fuses activations itself. Raises `ConfigError` for a model in training mode.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> report = fuse(model, (torch.ones(1, 3, 8, 8),)).report
    >>> report.num_operators_before, report.num_operators_after
    (3, 1)
    """
    if model.training:
        raise ConfigError("the model is in training mode and fusing is for inference; call model.eval() first")
    with torch.no_grad():
        exported = torch.export.export(model, tuple(example_inputs)).module()
    assert isinstance(exported, fx.GraphModule)
    return fuse_graph(
        copy_graph(exported), exported.graph.process_inputs(*example_inputs), kernels=kernels, rules=rules
    )


def fuse_graph(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    is_training: bool = False,
    kernels: Kernels = "eager",
    rules: Sequence[FusionRule] = RULES,
) -> Fused:
    """Fuse the operators of `graph_module` in place; `inputs` has one value for each placeholder."""
    num_before = count_operators(graph_module)
    if is_training:
        rejections = tuple(RefusedFusion(rule.name, "the graph", (), IN_TRAINING) for rule in rules)
        return Fused(graph_module, FusionReport((), rejections, num_before, num_before))
    fusions: list[Fusion] = []
    rejections_found: list[RefusedFusion] = []
    graph = Rewriting(graph_module, observe(graph_module, inputs).values, kernels=kernels)
    _fuse_branches(graph, rules, fusions, rejections_found)
    for rule in rules:
        _apply(rule, graph, fusions, rejections_found)
    remove_unused(graph_module)
    report = FusionReport(tuple(fusions), tuple(rejections_found), num_before, count_operators(graph_module))
    return Fused(graph_module, report)


def count_operators(graph_module: fx.GraphModule) -> int:
    """Return the number of operators that compute, branches included; views, constants and sizes do not."""
    own = sum(is_computation(node) for node in graph_module.graph.nodes)
    return own + sum(count_operators(branch) for _, branch in find_branches(graph_module))


def find_branches(graph_module: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """Return the name and graph of each branch and loop body of a graph."""
    names = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr")
    values = [(name, read_attribute(graph_module, name)) for name in names]
    return [(name, value) for name, value in values if isinstance(value, fx.GraphModule)]


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module that can be rewritten without changing `graph_module`; tensors are shared."""
    graph = fx.Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(graph_module.graph, mapping, return_output_node=True)
    assert isinstance(output, tuple)
    value, old_output = output
    graph.output(value, type_expr=old_output.type).meta.update(old_output.meta)
    graph.set_codegen(graph_module.graph._codegen)
    copied = fx.GraphModule(graph_module, graph)
    copied.meta.update(graph_module.meta)
    for name, branch in find_branches(copied):
        setattr(copied, name, copy_graph(branch))
    return copied


def remove_unused(graph_module: fx.GraphModule) -> None:
    """Drop nodes whose values nobody reads and constants that no node names, and compile what is left."""
    graph_module.graph.eliminate_dead_code()
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for path, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]:
        if path not in used and not any(path.startswith(f"{name}.") for name in used):
            parent, _, name = path.rpartition(".")
            delattr(graph_module.get_submodule(parent), name)
    _delete_unused_modules(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()


def _delete_unused_modules(graph_module: fx.GraphModule) -> None:
    """Drop modules that no node names; what is inside a branch belongs to its own graph."""
    named = {str(node.target) for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    for path in [path for path, _ in graph_module.named_modules() if path]:
        is_used = any(f"{name}.".startswith(f"{path}.") or path.startswith(f"{name}.") for name in named)
        if not is_used:
            graph_module.delete_submodule(path)


def _fuse_branches(
    graph: Rewriting, rules: Sequence[FusionRule], fusions: list[Fusion], rejections: list[RefusedFusion]
) -> None:
    """Fuse inside the branches of `torch.cond`, to which weights are handed as operands."""
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.higher_order.cond:
            continue
        _, *branches, operands = node.args
        for branch_node in branches:
            branch = read_attribute(graph.graph_module, str(branch_node.target))
            inputs = [stand_in(graph.values, operand) for operand in operands]
            bound = dict(zip(branch.graph.find_nodes(op="placeholder"), operands, strict=True))
            constants = {inner: graph.constant(outer) for inner, outer in bound.items()}
            inner_graph = Rewriting(
                branch,
                observe(branch, inputs).values,
                kernels=graph.kernels,
                bound={inner: value for inner, value in constants.items() if value is not None},
            )
            _fuse_branches(inner_graph, rules, fusions, rejections)
            for rule in rules:
                _apply(rule, inner_graph, fusions, rejections)
            remove_unused(branch)


def _apply(rule: FusionRule, graph: Rewriting, fusions: list[Fusion], rejections: list[RefusedFusion]) -> None:
    erased: set[Node] = set()
    for node in list(graph.graph.nodes):
        match = None if node in erased else rule.match(node, graph)
        if match is None:
            continue
        where, names = find_line(node), _names(match)
        outcome = match.reason if isinstance(match, Refusal) else _try(match, graph)
        if isinstance(outcome, str):
            rejections.append(RefusedFusion(rule.name, where, names, outcome))
            continue
        assert isinstance(match, ProposedRewrite)
        erased.update(match.replaced)
        fusions.append(Fusion(rule.name, where, names, outcome))


def _names(match: ProposedRewrite | Refusal) -> tuple[str, ...]:
    nodes = match.nodes if isinstance(match, Refusal) else match.replaced
    return tuple(node.name for node in nodes)


def _try(candidate: ProposedRewrite, graph: Rewriting) -> float | str:
    """Rewrite, compare, and take it back where the numbers are wrong; the error, or why it was taken back."""
    reason = why_not_movable(candidate, graph)
    if reason is not None:
        return reason
    place = candidate.replaced[0] if len(candidate.results) > 1 else candidate.replaced[-1]
    graph.emitted = []
    with graph.graph.inserting_before(place):
        results = candidate.emit()
    try:
        comparison = compare(candidate, results, graph)
    except (RuntimeError, IndexError, ValueError) as error:
        _erase(reversed(graph.emitted), graph)
        return f"taken back: it does not run here ({str(error).splitlines()[0]})"
    if not comparison.is_right:
        _erase(reversed(graph.emitted), graph)
        worst = max(comparison.error, comparison.weight_error or 0.0)
        return f"taken back: it is off by {worst:.1e} of the largest value, and {comparison.bound:.1e} is allowed"
    _replace(candidate, results, graph)
    return comparison.error


def _replace(candidate: ProposedRewrite, results: Sequence[Node], graph: Rewriting) -> None:
    for old, new in zip(candidate.results, results, strict=True):
        if new not in candidate.inputs:
            new.meta = {key: value for key, value in old.meta.items() if key not in ("from_node", "source_fn_stack")}
        old.replace_all_uses_with(new)
    for reader, target in candidate.after.items():
        reader.target = target
    _erase(reversed(candidate.replaced), graph)


def _erase(nodes: Any, graph: Rewriting) -> None:
    for node in nodes:
        graph.graph.erase_node(node)
        if node.op == "get_attr":
            delattr(graph.graph_module, str(node.target))
    graph.emitted = []


__all__ = [
    "RULES",
    "Fused",
    "Fusion",
    "FusionReport",
    "FusionRule",
    "RefusedFusion",
    "fuse",
    "fuse_graph",
    "read_attribute",
]
