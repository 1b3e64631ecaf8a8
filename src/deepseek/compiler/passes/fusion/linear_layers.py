"""Linear layers that become one: those that follow each other, and those that read the same input.

Two layers in a row are one whose weight is the product of theirs, which is worth it only where the product has fewer
numbers: a bottleneck (512 to 64 to 512) is cheaper as two. Layers side by side, such as queries, keys and values, are
one with their weights stacked; each then takes its slice, which is a view and costs nothing. A matmul of 8 x 768 by
768 x 2304 takes 0.86 of the time of three of a third of it, on one Zen 4 core, and one call instead of three.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from deepseek.compiler.passes.effects import is_computation
from deepseek.compiler.passes.fusion.graphs import Match, ProposedRewrite, Refusal, Rewriting, to_float64
from deepseek.compiler.passes.fusion.operator_values import LinearMap, is_identity, read_linear, skip_identities

aten = torch.ops.aten


def match_identity(node: Node, graph: Rewriting) -> Match:
    """Dropout in evaluation, which returns its input."""
    if not is_identity(node) or not is_computation(node):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    if any(user.op == "output" for user in node.users) and source.op == "placeholder":
        return None
    return ProposedRewrite((node,), (node,), (source,), lambda: (source,))


def match_consecutive_linears(node: Node, graph: Rewriting) -> Match:
    """Return a linear layer that reads nothing but another."""
    second = read_linear(node, graph)
    if second is None:
        return None
    source, skipped = skip_identities(second.x)
    first = read_linear(source, graph)
    if first is None:
        return None
    replaced = (source, *skipped, node)
    if len(source.users) != 1:
        return Refusal(replaced, f"{source.name} is read by others as well")
    num_before, num_after = _count_products(first) + _count_products(second), first.x_size * second.y_size
    if num_after >= num_before:
        return Refusal(replaced, f"one layer would take {num_after:,} products for each row instead of {num_before:,}")

    def emit() -> tuple[Node, ...]:
        weight, bias = multiply(first, second)
        dtype = second.weight.dtype
        new_weight = graph.add_constant(weight.to(dtype), "weight")
        new_bias = None if bias is None else graph.add_constant(bias.to(dtype), "bias")
        return (graph.add_call(aten.linear.default, first.x, new_weight, new_bias, like=graph.values[node]),)

    return ProposedRewrite(replaced, (node,), (first.x,), emit)


def multiply(first: LinearMap, second: LinearMap) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias, in float64, of `second` after `first`."""
    outer = to_float64(second.weight)
    weight = outer @ to_float64(first.weight)
    bias = None if second.bias is None else to_float64(second.bias)
    if first.bias is not None:
        moved = outer @ to_float64(first.bias)
        bias = moved if bias is None else bias + moved
    return weight, bias


def match_parallel_linears(node: Node, graph: Rewriting) -> Match:
    """Return the first of several linear layers that read the same input."""
    lead = read_linear(node, graph)
    if lead is None:
        return None
    found = [read_linear(reader, graph) for reader in graph.graph.nodes if reader in lead.x.users]
    layers = [layer for layer in found if layer is not None and layer.x is lead.x]
    if len(layers) < 2 or layers[0].node is not node:
        return None
    nodes = tuple(layer.node for layer in layers)
    reason = _why_not_together(layers)
    if reason is not None:
        return Refusal(nodes, reason)
    readers = {
        user: aten.reshape.default for linear in nodes for user in linear.users if user.target is aten.view.default
    }
    return ProposedRewrite(nodes, nodes, (lead.x,), lambda: _emit_stacked(layers, graph), after=dict(readers))


def _emit_stacked(layers: list[LinearMap], graph: Rewriting) -> tuple[Node, ...]:
    weight = graph.add_constant(torch.cat([layer.weight for layer in layers]), "weight")
    bias = _stack_biases(layers)
    new_bias = None if bias is None else graph.add_constant(bias, "bias")
    sizes = [layer.y_size for layer in layers]
    values = [graph.values[layer.node] for layer in layers]
    stacked = torch.cat([torch.empty_like(value, device="meta") for value in values], dim=-1)
    together = graph.add_call(aten.linear.default, layers[0].x, weight, new_bias, like=stacked)
    slices = graph.add_call(aten.split_with_sizes.default, together, sizes, -1, like=tuple(values))
    return tuple(graph.add_call(operator.getitem, slices, index, like=value) for index, value in enumerate(values))


def _stack_biases(layers: list[LinearMap]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias for layer in layers])


def _why_not_together(layers: list[LinearMap]) -> str | None:
    if len({(layer.weight.dtype, layer.weight.device) for layer in layers}) > 1:
        return "their weights differ in dtype or device"
    if any(user.op == "output" for layer in layers for user in layer.node.users):
        return "a result leaves the graph, where a slice would keep the memory of all"
    return None


def _count_products(linear: LinearMap) -> int:
    return linear.x_size * linear.y_size
