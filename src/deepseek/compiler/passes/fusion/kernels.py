"""Layer, residual addition and activation in one kernel of oneDNN, which writes the result once.

Only for graphs that are run operator by operator on a CPU: a code generator fuses what comes after a layer itself, and
is left to it. The kernels have no gradient, so this is for inference. Weights are put into the kernels' blocked order
ahead of time, which an operator would otherwise do in every call: a 3 x 3 convolution of 512 channels on 7 x 7 pixels
spends more on that than on its arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from deepseek.compiler.passes.effects import find_root, is_aten, read_arguments
from deepseek.compiler.passes.fusion.graphs import Match, ProposedRewrite, Refusal, Rewriting
from deepseek.compiler.passes.fusion.operator_values import (
    Activation,
    Convolution,
    read_activation,
    read_convolution,
    read_linear,
)

aten = torch.ops.aten
_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_AFTER_ADDITION = "relu"  # the one activation that the kernel with an addition has
_LEFT_TO_INDUCTOR = "left to the code generator, which fuses it into the loop that writes the result"


def match_convolution_add_activation(node: Node, graph: Rewriting) -> Match:
    """Convolution, then addition of something as large, then (most often) an activation."""
    activation = read_activation(node)
    addition = activation.x if activation is not None else node
    if addition.target not in _ADDITIONS or (activation is not None and activation.name != _AFTER_ADDITION):
        return None
    if activation is None and any(_ends_with_kernel(user) for user in addition.users):
        return None  # matched at the activation
    found = _find_convolution_term(addition, graph)
    if found is None:
        return None
    convolution, other = found
    tail = () if activation is None else activation.replaced
    replaced = (convolution.node, addition, *tail)
    reason = _why_no_kernel(convolution, graph) or _why_not_added(addition, convolution.node, other, graph)
    if reason is None and tail and len(addition.users) != 1:
        reason = f"{addition.name} is read by others as well"
    if reason is not None:
        return Refusal(replaced, reason)

    def emit() -> tuple[Node, ...]:
        call = torch.ops.mkldnn._convolution_pointwise.binary
        arguments = _shared_arguments(convolution, graph)
        after = (None, [], None) if activation is None else _named(activation)
        return (graph.add_call(call, convolution.x, other, *arguments, "add", 1.0, *after, like=graph.values[node]),)

    return ProposedRewrite(replaced, (node,), (convolution.x, other), emit)


def match_convolution_activation(node: Node, graph: Rewriting) -> Match:
    """Convolution, then an activation."""
    activation = read_activation(node)
    convolution = None if activation is None else read_convolution(activation.x, graph)
    if activation is None or convolution is None:
        return None
    return _pointwise(convolution, activation, graph)


def match_convolution(node: Node, graph: Rewriting) -> Match:
    """Return a convolution that nothing fuses with: only its weights are laid out ahead."""
    convolution = read_convolution(node, graph)
    if convolution is None:
        return None
    return _pointwise(convolution, None, graph)


def match_linear_activation(node: Node, graph: Rewriting) -> Match:
    """Linear layer, then an activation."""
    activation = read_activation(node)
    linear = None if activation is None else read_linear(activation.x, graph)
    if activation is None or linear is None:
        return None
    replaced = (linear.node, *activation.replaced)
    reason = _why_no_kernel_for(linear.node, linear.weight, graph)
    if reason is None and len(linear.node.users) != len(set(activation.replaced) & set(linear.node.users)):
        reason = f"{linear.node.name} is read by others as well"
    if reason is not None:
        return Refusal(replaced, reason)

    def emit() -> tuple[Node, ...]:
        weight, bias = _add_weights(linear.weight, linear.bias, graph)
        call = torch.ops.mkldnn._linear_pointwise.default
        return (graph.add_call(call, linear.x, weight, bias, *_named(activation), like=graph.values[node]),)

    return ProposedRewrite(replaced, (node,), (linear.x,), emit)


def _pointwise(convolution: Convolution, activation: Activation | None, graph: Rewriting) -> Match:
    node = convolution.node if activation is None else activation.node
    tail = () if activation is None else activation.replaced
    replaced = (convolution.node, *tail)
    reason = _why_no_kernel(convolution, graph)
    if reason is None and tail and set(convolution.node.users) - set(tail):
        reason = f"{convolution.node.name} is read by others as well"
    if reason is not None:
        return Refusal(replaced, reason) if tail else None

    def emit() -> tuple[Node, ...]:
        call = torch.ops.mkldnn._convolution_pointwise.default
        after = ("none", [], "") if activation is None else _named(activation)
        arguments = _shared_arguments(convolution, graph)
        return (graph.add_call(call, convolution.x, *arguments, *after, like=graph.values[node]),)

    return ProposedRewrite(replaced, (node,), (convolution.x,), emit)


def _shared_arguments(convolution: Convolution, graph: Rewriting) -> tuple[Any, ...]:
    layout = convolution.padding, convolution.stride, convolution.dilation, convolution.groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(convolution.weight, *layout, list(graph.shape(convolution.x)))
    weight = graph.add_constant(packed, "weight")
    bias = None if convolution.bias is None else graph.add_constant(convolution.bias, "bias")
    return weight, bias, *layout


def _add_weights(weight: Tensor, bias: Tensor | None, graph: Rewriting) -> tuple[Node, Node | None]:
    new_weight = graph.add_constant(weight, "weight")
    return new_weight, None if bias is None else graph.add_constant(bias, "bias")


def _named(activation: Activation) -> tuple[str, list[float], str]:
    return activation.name, list(activation.scalars), activation.algorithm


def _ends_with_kernel(node: Node) -> bool:
    activation = read_activation(node)
    return activation is not None and activation.name == _AFTER_ADDITION


def _find_convolution_term(addition: Node, graph: Rewriting) -> tuple[Convolution, Node] | None:
    """Return the term that is a convolution nobody else reads, the later one of two, and the other term."""
    values = read_arguments(addition)
    terms = [values["self"], values["other"]]
    indices = {node: index for index, node in enumerate(graph.graph.nodes)}
    pairs = [(terms[0], terms[1]), (terms[1], terms[0])]
    pairs = [(one, two) for one, two in pairs if isinstance(one, Node) and isinstance(two, Node) and one is not two]
    for one, two in sorted(pairs, key=lambda pair: -indices[pair[0]]):
        convolution = read_convolution(one, graph) if len(one.users) == 1 else None
        if convolution is not None:
            return convolution, two
    return None


def _why_not_added(addition: Node, term: Node, other: Node, graph: Rewriting) -> str | None:
    if read_arguments(addition)["alpha"] != 1:
        return "one term is scaled"
    if addition.target is aten.add_.Tensor and addition.args[0] is other and not _is_read_once(other):
        return f"the sum is written into {other.name}, which may be read under another name"
    value, added = graph.values[term], graph.values[other]
    if value.shape != added.shape or value.dtype != added.dtype:
        return f"{other.name} has another shape or dtype than the convolution"
    return None


def _is_read_once(node: Node) -> bool:
    """Return whether nobody can see what is written into `node`, other than through the node that writes."""
    return is_aten(node) and find_root(node) is node and len(node.users) == 1


def _why_no_kernel(convolution: Convolution, graph: Rewriting) -> str | None:
    if convolution.is_transposed:
        return "there is no such kernel for a transposed convolution"
    if len(graph.shape(convolution.x)) != convolution.num_spatial + 2 or convolution.num_spatial == 1:
        return "the kernel takes images and volumes with a batch"
    return _why_no_kernel_for(convolution.node, convolution.weight, graph)


def _why_no_kernel_for(node: Node, weight: Tensor, graph: Rewriting) -> str | None:
    if graph.kernels == "inductor":
        return _LEFT_TO_INDUCTOR
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return f"the fused kernel is oneDNN's, for CPUs; the weights are on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16) or graph.values[node].dtype != weight.dtype:
        return f"the fused kernel takes float32 and bfloat16, not {weight.dtype}"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "the fused kernel takes bfloat16 on a processor with AVX-512, which this one has not"
    return None
