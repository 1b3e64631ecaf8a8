"""Batch normalization by stored statistics, folded into the layer before it.

Normalization is y = x * scale + shift per channel. After a convolution or a linear layer that is the same layer with
its weights scaled and its bias moved (Jacob et al., arXiv:1712.05877, section 3.2): one operator and one pass over the
activations less. Weights are folded in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from deepseek.compiler.passes.fusion.graphs import Match, ProposedRewrite, Refusal, Rewriting, to_float64
from deepseek.compiler.passes.fusion.operator_values import (
    BatchNorm,
    Convolution,
    LinearMap,
    read_batch_norm,
    read_convolution,
    read_linear,
    skip_identities,
)


def match_convolution_batch_norm(node: Node, graph: Rewriting) -> Match:
    """Convolution, then normalization."""
    norm = read_batch_norm(node, graph)
    if norm is None:
        return None
    source, skipped = skip_identities(norm.x)
    convolution = read_convolution(source, graph)
    if convolution is None:
        return None
    replaced = (source, *skipped, *norm.replaced)
    if any(len(inner.users) != 1 for inner in replaced[:-1]):
        return Refusal(replaced, f"{source.name} is read by others as well, who need it before normalization")
    x = convolution.x
    has_batch = len(graph.shape(source)) == convolution.num_spatial + 2
    if not has_batch:
        return Refusal(replaced, "the input has no batch, so that normalization reads its channels from another dim")

    def emit() -> tuple[Node, ...]:
        weight, bias = fold_convolution(convolution, norm)
        dtype = convolution.weight.dtype
        new_weight = graph.add_constant(weight.to(dtype), "weight")
        new_bias = graph.add_constant(bias.to(dtype), "bias")
        rest = source.args[3:]
        return (graph.add_call(source.target, x, new_weight, new_bias, *rest, like=graph.values[node]),)  # type: ignore[arg-type]

    return ProposedRewrite(replaced, (node,), (x,), emit)


def match_linear_batch_norm(node: Node, graph: Rewriting) -> Match:
    """Linear layer, then normalization of its outputs."""
    norm = read_batch_norm(node, graph)
    if norm is None:
        return None
    source, skipped = skip_identities(norm.x)
    linear = read_linear(source, graph)
    if linear is None:
        return None
    replaced = (source, *skipped, *norm.replaced)
    if len(graph.shape(source)) != 2:
        return Refusal(replaced, "normalization runs over dim 1, which is not the outputs of the linear layer here")
    if any(len(inner.users) != 1 for inner in replaced[:-1]):
        return Refusal(replaced, f"{source.name} is read by others as well, who need it before normalization")

    def emit() -> tuple[Node, ...]:
        weight, bias = fold_linear(linear, norm)
        dtype = linear.weight.dtype
        new_weight = graph.add_constant(weight.to(dtype), "weight")
        new_bias = graph.add_constant(bias.to(dtype), "bias")
        call = torch.ops.aten.linear.default
        return (graph.add_call(call, linear.x, new_weight, new_bias, like=graph.values[node]),)

    return ProposedRewrite(replaced, (node,), (linear.x,), emit)


def fold_convolution(convolution: Convolution, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the weight and bias, in float64, of the convolution that normalizes as well."""
    weight = to_float64(convolution.weight)
    if convolution.is_transposed:
        inputs, outputs, *kernel = weight.shape
        groups = convolution.groups
        scale = norm.scale.reshape(groups, 1, outputs, *(1 for _ in kernel))
        folded = (weight.reshape(groups, inputs // groups, outputs, *kernel) * scale).reshape(weight.shape)
    else:
        folded = weight * norm.scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    return folded, _fold_bias(convolution.bias, norm)


def fold_linear(linear: LinearMap, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the weight and bias, in float64, of the linear layer that normalizes as well."""
    return to_float64(linear.weight) * norm.scale[:, None], _fold_bias(linear.bias, norm)


def _fold_bias(bias: Tensor | None, norm: BatchNorm) -> Tensor:
    return norm.shift if bias is None else to_float64(bias) * norm.scale + norm.shift
