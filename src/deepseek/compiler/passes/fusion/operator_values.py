"""Operators read as values: what a node computes, whichever of torch's spellings it uses.

The same convolution is `conv2d` straight after capture and `convolution` after decomposition; a linear layer is
`linear`, or `addmm` of a transposed weight; an activation may be one operator or five. Rules ask the readers here and
see one form.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from deepseek.compiler.passes.effects import is_aten, read_arguments
from deepseek.compiler.passes.fusion.graphs import Rewriting

aten = torch.ops.aten

_CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)
# Operators that hand their input on as it is, in evaluation.
_IDENTITIES = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alias.default)


@dataclass(frozen=True)
class Convolution:
    """A convolution with constant weights."""

    node: Node
    x: Node
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    is_transposed: bool
    output_padding: list[int]

    @property
    def num_spatial(self) -> int:
        """Return the number of dims that the kernel moves along."""
        return self.weight.dim() - 2


@dataclass(frozen=True)
class LinearMap:
    """A linear layer with constant weights."""

    node: Node
    x: Node
    weight: Tensor
    bias: Tensor | None

    @property
    def x_size(self) -> int:
        """Return the number of inputs."""
        return int(self.weight.shape[1])

    @property
    def y_size(self) -> int:
        """Return the number of outputs."""
        return int(self.weight.shape[0])


@dataclass(frozen=True)
class BatchNorm:
    """Normalization by stored statistics: y = x * scale + shift, per channel, both in float64."""

    node: Node
    x: Node
    scale: Tensor
    shift: Tensor
    replaced: tuple[Node, ...]


@dataclass(frozen=True)
class Activation:
    """An element-wise function that oneDNN knows: its name there, its numbers and its variant."""

    node: Node
    x: Node
    name: str
    scalars: tuple[float, ...]
    algorithm: str
    replaced: tuple[Node, ...]


def read_convolution(node: Node, graph: Rewriting) -> Convolution | None:
    """`node` as a convolution; `None` for anything else, and for computed weights."""
    if node.target not in _CONVOLUTIONS and node.target is not aten.convolution.default:
        return None
    values = read_arguments(node)
    x, weight = values["input"], graph.constant(values["weight"])
    bias = graph.constant(values["bias"])
    if weight is None or (values["bias"] is not None and bias is None):
        return None
    dims = weight.dim() - 2
    return Convolution(
        node,
        x,
        weight,
        bias,
        _spread(values["stride"], dims),
        _spread(values["padding"], dims),
        _spread(values["dilation"], dims),
        values["groups"],
        bool(values.get("transposed", False)),
        _spread(values.get("output_padding", 0), dims),
    )


def read_linear(node: Node, graph: Rewriting) -> LinearMap | None:
    """`node` as a linear layer; `None` for anything else, and for computed weights."""
    if not is_aten(node):
        return None
    values = read_arguments(node)
    if node.target is aten.linear.default:
        weight, bias, x = graph.constant(values["weight"]), values["bias"], values["input"]
    elif node.target is aten.addmm.default and values["beta"] == values["alpha"] == 1:
        weight, bias, x = _transposed(values["mat2"], graph), values["self"], values["mat1"]
    elif node.target is aten.mm.default:
        weight, bias, x = _transposed(values["mat2"], graph), None, values["self"]
    else:
        return None
    bias_value = graph.constant(bias)
    if weight is None or weight.dim() != 2 or (bias is not None and (bias_value is None or bias_value.dim() != 1)):
        return None
    return LinearMap(node, x, weight, bias_value)


def read_batch_norm(node: Node, graph: Rewriting) -> BatchNorm | None:
    """`node` as a normalization by stored statistics; `None` for one that measures its batch."""
    if node.target is aten.batch_norm.default:
        values = read_arguments(node)
        if values["training"]:
            return None
        replaced: tuple[Node, ...] = (node,)
    elif node.target is operator.getitem and node.args[1] == 0 and _is_normalizing(node.args[0]):
        inner = node.args[0]
        assert isinstance(inner, Node)
        if len(inner.users) != 1:
            return None
        values, replaced = read_arguments(inner), (inner, node)
    else:
        return None
    return _fold_statistics(node, values, replaced, graph)


def read_activation(node: Node) -> Activation | None:
    """`node` as the end of an activation."""
    for read in (_read_named, _read_silu, _read_hardswish):
        found = read(node)
        if found is not None:
            return found
    return None


def skip_identities(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """Return the node whose value reaches `node` unchanged, and the nodes in between (those that others read stop
    it)."""
    skipped: list[Node] = []
    while is_identity(node) and len(node.users) == 1:
        skipped.insert(0, node)
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node, tuple(skipped)


def is_identity(node: Node) -> bool:
    """Return whether `node` returns its input: dropout in evaluation, an alias."""
    if node.target not in _IDENTITIES:
        return False
    values = read_arguments(node)
    return not values.get("train", False) or values.get("p") == 0


def _spread(value: Any, dims: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _transposed(node: Any, graph: Rewriting) -> Tensor | None:
    if not isinstance(node, Node) or node.target not in _TRANSPOSES:
        return None
    weight = graph.constant(node.args[0])
    return weight if weight is not None and weight.dim() == 2 and _swaps(node) else None


def _swaps(node: Node) -> bool:
    """Return whether a reordering of two dims swaps them."""
    if node.target is aten.t.default:
        return True
    dims: Any = node.args[1] if node.target is aten.permute.default else node.args[1:]
    return dims[0] % 2 != dims[1] % 2 and (node.target is aten.transpose.int or dims[0] % 2 == 1)


def _is_normalizing(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten._native_batch_norm_legit_no_training.default


def _fold_statistics(
    node: Node, values: dict[str, Any], replaced: tuple[Node, ...], graph: Rewriting
) -> BatchNorm | None:
    mean, variance = graph.constant(values["running_mean"]), graph.constant(values["running_var"])
    weight, bias = graph.constant(values["weight"]), graph.constant(values["bias"])
    is_computed = (values["weight"] is not None and weight is None) or (values["bias"] is not None and bias is None)
    if mean is None or variance is None or is_computed:
        return None
    scale = (variance.double() + values["eps"]).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    return BatchNorm(node, values["input"], scale, shift, replaced)


# Operator -> name at oneDNN, its numbers and its variant, from the operator's arguments.
_ACTIVATIONS: dict[Any, Callable[[dict[str, Any]], tuple[str, tuple[float, ...], str]]] = {
    aten.relu.default: lambda _: ("relu", (), ""),
    aten.relu_.default: lambda _: ("relu", (), ""),
    aten.relu6.default: lambda _: ("hardtanh", (0.0, 6.0), ""),
    aten.relu6_.default: lambda _: ("hardtanh", (0.0, 6.0), ""),
    aten.hardtanh.default: lambda values: ("hardtanh", (values["min_val"], values["max_val"]), ""),
    aten.hardtanh_.default: lambda values: ("hardtanh", (values["min_val"], values["max_val"]), ""),
    aten.hardswish.default: lambda _: ("hardswish", (), ""),
    aten.hardswish_.default: lambda _: ("hardswish", (), ""),
    aten.silu.default: lambda _: ("swish", (), ""),
    aten.silu_.default: lambda _: ("swish", (), ""),
    aten.sigmoid.default: lambda _: ("sigmoid", (), ""),
    aten.tanh.default: lambda _: ("tanh", (), ""),
    aten.leaky_relu.default: lambda values: ("leaky_relu", (values["negative_slope"],), ""),
    aten.leaky_relu_.default: lambda values: ("leaky_relu", (values["negative_slope"],), ""),
    aten.gelu.default: lambda values: ("gelu", (), values["approximate"]),
}


def _read_named(node: Node) -> Activation | None:
    if node.target not in _ACTIVATIONS:
        return None
    name, scalars, algorithm = _ACTIVATIONS[node.target](read_arguments(node))
    x = node.args[0]
    assert isinstance(x, Node)
    return Activation(node, x, name, scalars, algorithm, (node,))


def _read_silu(node: Node) -> Activation | None:
    """x * sigmoid(x), as decomposition leaves it."""
    if node.target is not aten.mul.Tensor:
        return None
    for x, gate in (node.args, node.args[::-1]):
        if isinstance(gate, Node) and gate.target is aten.sigmoid.default and gate.args[0] is x:
            assert isinstance(x, Node)
            if len(gate.users) == 1 and set(x.users) == {gate, node}:
                return Activation(node, x, "swish", (), "", (gate, node))
    return None


def _read_hardswish(node: Node) -> Activation | None:
    """x * clamp(clamp(x + 3, 0), None, 6) / 6, as decomposition leaves it."""
    product = _single(node, aten.div.Tensor, 6)
    if product is None or product.target is not aten.mul.Tensor:
        return None
    x, high = product.args
    low = _single(high, aten.clamp.default, None, 6)
    total = _single(low, aten.clamp.default, 0)
    if total is None or _single(total, aten.add.Tensor, 3) is not x or not isinstance(x, Node):
        return None
    inside = [high, low, total, product]
    if set(x.users) != {total, product} or any(len(inner.users) != 1 for inner in inside):  # type: ignore[union-attr]
        return None
    return Activation(node, x, "hardswish", (), "", (total, low, high, product, node))  # type: ignore[arg-type]


def _single(node: Any, target: Any, *rest: Any) -> Node | None:
    """Return the first argument of `node` where it calls `target` with `rest` after it."""
    if not isinstance(node, Node) or node.target is not target or tuple(node.args[1:]) != rest:
        return None
    first = node.args[0]
    return first if isinstance(first, Node) else None
