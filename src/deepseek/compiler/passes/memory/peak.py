"""Peak memory of a captured graph: told in advance, then lowered by order and by writing in place.

`describe` turns a graph into the plain value graph of `liveness.py`: one step per node, one buffer per storage. Views
share the buffer of what they view; an operator that writes, draws random numbers or is unknown keeps its place among
the others that do, and everything that touches a buffer stays on its side of whoever writes into it. `lower_peak`
then applies what the policy answers: nodes are moved, and operators that have an in-place form write into an input
that nobody needs any more.

In training the backward pass needs values again. There an operator writes in place only where its own gradient is
computed from its result (or needs nothing) and what it overwrites is the result of an operator that does not need it
back. What autograd keeps is the subject of `recomputation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from deepseek.compiler.passes.effects import find_written, has_effects, is_aten, is_opaque, is_view
from deepseek.compiler.passes.fusion.graphs import read_attribute
from deepseek.compiler.passes.memory.ordering import (
    BufferGraph,
    GraphStep,
    arrange,
    find_peak,
    reorder,
    reuse,
)
from deepseek.compiler.passes.memory.peak_tracking import measure_peaks_on_cpu, tensors_in
from deepseek.compiler.passes.shape_inference import Observed, observe, stand_in

aten = torch.ops.aten
_NO_STEPS = ("placeholder", "get_attr", "output")
_KERNELS_WITH_SCRATCH = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(torch.ops.mkldnn._convolution_pointwise.default, torch.ops.mkldnn._convolution_pointwise.binary),
)
# In training: operators whose gradient needs their result at most, and operators that do not need theirs back.
_TRAINED_IN_PLACE = (aten.relu.default, aten.add.Tensor, aten.sigmoid.default, aten.tanh.default)
_NOT_NEEDED_BACK = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default),
    *(aten.batch_norm.default, aten.add.Tensor, aten.layer_norm.default),
)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a graph takes above its inputs and weights, at its peak, as the passes go over it."""

    peak_before_bytes: int
    peak_reordered_bytes: int
    peak_in_place_bytes: int
    is_order_optimal: bool
    """Whether no order has a lower peak."""
    num_in_place: int
    """Operators that write into one of their inputs now."""

    def __str__(self) -> str:
        best = "the least there is" if self.is_order_optimal else "not proven least"
        return (
            f"peak {self.peak_before_bytes:,} bytes; reordered {self.peak_reordered_bytes:,} ({best}); "
            f"{self.num_in_place} operators in place {self.peak_in_place_bytes:,}"
        )


def predict_peak_bytes(graph_module: fx.GraphModule, inputs: Sequence[Any], *, with_kernels: bool = False) -> int:
    """Return the bytes that running `graph_module` operator by operator will take at its peak, without gradients.

    `inputs` has one value per placeholder. Inputs and weights are not counted, results are. Convolutions on a CPU take
    memory for themselves, to lay out weights and images: with `with_kernels` each kind of them runs once to see how
    much, which needs torch's profiler. Without, nothing is computed.
    """
    observed = observe(graph_module, inputs)
    kernels = measure_kernels(graph_module, observed) if with_kernels else {}
    return find_peak(describe(graph_module, Observed(observed.values, observed.scratch_bytes | kernels)))


def measure_kernels(graph_module: fx.GraphModule, observed: Observed) -> dict[Node, int]:
    """Measure the bytes that each convolution on a CPU takes for itself; each kind is run on zeros, twice."""
    nodes = [node for node in graph_module.graph.nodes if node.target in _KERNELS_WITH_SCRATCH]
    kinds = {_find_kind(node, observed): node for node in nodes if observed.values[node].device.type == "cpu"}
    runs = [_on_zeros(node, graph_module, observed) for node in kinds.values()]
    with torch.no_grad():
        results_bytes = [run().untyped_storage().nbytes() for run in runs]
        peaks = measure_peaks_on_cpu(runs)
    scratch = {
        kind: max(0, peak.peak_bytes - result_bytes)
        for kind, peak, result_bytes in zip(kinds, peaks, results_bytes, strict=True)
    }
    return {node: scratch[_find_kind(node, observed)] for node in nodes if _find_kind(node, observed) in scratch}


def _find_kind(node: Node, observed: Observed) -> str:
    """Return a key of everything that an operator's scratch memory depends on."""

    def describe_argument(operand: Node) -> Any:
        value = observed.values[operand]
        return (tuple(value.shape), str(value.dtype), str(value.layout), _strides(value))

    return str((node.target, map_arg(node.args, lambda operand: str(describe_argument(operand)))))


def _on_zeros(node: Node, graph_module: fx.GraphModule, observed: Observed) -> Callable[[], Tensor]:
    def make(operand: Node) -> Any:
        value = observed.values[operand]
        if value.is_mkldnn:
            return read_attribute(graph_module, str(operand.target))
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()

    target, arguments = node.target, map_arg(node.args, make)
    assert callable(target)
    return lambda: target(*arguments)


def _strides(value: Tensor) -> tuple[int, ...]:
    return () if value.is_mkldnn else value.stride()


def lower_peak(graph_module: fx.GraphModule, inputs: Sequence[Any], *, is_training: bool) -> MemoryReport:
    """Reorder the nodes of `graph_module` and let them write in place, both in place."""
    observed = observe(graph_module, inputs)
    graph = describe(graph_module, observed, is_training=is_training)
    order = reorder(graph)
    arranged = arrange(graph, order.names)
    reused = reuse(arranged)
    move_nodes_(graph_module, order.names)
    write_in_place_(graph_module, reused)
    return MemoryReport(
        find_peak(graph),
        order.peak_bytes,
        find_peak(arranged, reused),
        order.is_optimal,
        len(reused),
    )


def describe(graph_module: fx.GraphModule, observed: Observed, *, is_training: bool = False) -> BufferGraph:
    """`graph_module` as steps over buffers."""
    nodes = list(graph_module.graph.nodes)
    buffers = {node: _find_buffers(observed.values.get(node)) for node in nodes}
    sizes: dict[str, int] = {}
    creates: dict[Node, tuple[str, ...]] = {}
    for node in nodes:
        new = {name: size for name, size in buffers[node].items() if name not in sizes}
        creates[node] = tuple(new)
        sizes.update(new)
    outside = {name for node in nodes if node.op in ("placeholder", "get_attr") for name in buffers[node]}
    follows = _order_effects(nodes, buffers)
    steps = tuple(
        GraphStep(
            node.name,
            frozenset(name for source in node.all_input_nodes for name in buffers[source]),
            creates[node],
            frozenset(follows[node] | {source.name for source in node.all_input_nodes if source.op not in _NO_STEPS}),
            _find_scratch(node, observed, graph_module),
            _find_overwritable(node, observed, buffers, is_training=is_training),
        )
        for node in nodes
        if node.op not in _NO_STEPS
    )
    kept = {
        name for node in nodes if node.op == "output" for result in node.all_input_nodes for name in buffers[result]
    }
    return BufferGraph(steps, sizes, frozenset(outside), frozenset(kept))


def move_nodes_(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    """Put the nodes of `graph_module` into the order of `names`."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    (output,) = graph_module.graph.find_nodes(op="output")
    for name in names:
        output.prepend(nodes[name])
    graph_module.graph.lint()
    graph_module.recompile()


def write_in_place_(graph_module: fx.GraphModule, reused: dict[str, str]) -> None:
    """Let the nodes named in `reused` call the in-place form of their operator."""
    for node in graph_module.graph.nodes:
        if node.name in reused:
            node.target, order = _in_place_forms(node)[0]
            node.args = tuple(node.args[index] for index in order)
    graph_module.recompile()


def _find_scratch(node: Node, observed: Observed, graph_module: fx.GraphModule) -> int:
    """Return the bytes a node takes for itself; a linear layer adds its bias in place except when it is observed."""
    if node.target is aten.linear.default and isinstance(node.args[0], Node):
        x = observed.values[node.args[0]]
        return 0 if x.is_contiguous() else int(x.nbytes)
    if node.target is torch.ops.higher_order.cond:
        return _find_scratch_of_branches(node, observed, graph_module)
    return observed.scratch_bytes.get(node, 0)


def _find_scratch_of_branches(node: Node, observed: Observed, graph_module: fx.GraphModule) -> int:
    """Return the bytes that the larger branch takes beyond its result."""
    _, *branches, operands = node.args
    assert isinstance(operands, list | tuple)
    inputs = [stand_in(observed.values, operand) for operand in operands]
    names = [str(branch.target) for branch in branches if isinstance(branch, Node)]
    peaks = [predict_peak_bytes(read_attribute(graph_module, name), inputs) for name in names]
    return max(0, max(peaks) - sum(_find_buffers(observed.values[node]).values()))


def _find_buffers(value: Any) -> dict[str, int]:
    """Return the name and size of each storage of a value."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(value) if tensor.layout == torch.strided]
    return {f"{storage._cdata:x}": storage.nbytes() for storage in storages}


def _order_effects(nodes: Sequence[Node], buffers: dict[Node, dict[str, int]]) -> dict[Node, set[str]]:
    """For each node, the names of earlier ones that it must stay behind, beyond those whose values it reads."""
    follows: dict[Node, set[str]] = {node: set() for node in nodes}
    last_effect: Node | None = None
    last_write: dict[str, Node] = {}
    touched: dict[str, list[Node]] = {}
    for node in nodes:
        if node.op in _NO_STEPS:
            continue
        near = {name for neighbor in [node, *node.all_input_nodes] for name in buffers[neighbor]}
        written = set(near) if is_opaque(node) else {name for target in find_written(node) for name in buffers[target]}
        follows[node] |= {last_write[name].name for name in near if name in last_write}
        follows[node] |= {earlier.name for name in written for earlier in touched.get(name, [])}
        if has_effects(node):
            follows[node] |= {last_effect.name} if last_effect is not None else set()
            last_effect = node
        last_write |= dict.fromkeys(written, node)
        for name in near:
            touched.setdefault(name, []).append(node)
        follows[node].discard(node.name)
    return follows


def _find_overwritable(
    node: Node, observed: Observed, buffers: dict[Node, dict[str, int]], *, is_training: bool
) -> tuple[str, ...]:
    """Return the buffer that `node` could write its result into, as far as `node` and what made it can tell."""
    forms = _in_place_forms(node)
    if not forms or (is_training and not _may_overwrite_in_training(node)):
        return ()
    _, order = forms[0]
    source = node.args[order[0]]
    if not isinstance(source, Node):
        return ()
    old, new = observed.values[source], observed.values[node]
    fits = isinstance(old, Tensor) and isinstance(new, Tensor) and _is_alike(old, new) and len(buffers[source]) == 1
    is_shared = sum(argument is source for argument in node.args) > 1
    return tuple(buffers[source]) if fits and not is_shared else ()


def _may_overwrite_in_training(node: Node) -> bool:
    source = node.args[0]
    if node.target not in _TRAINED_IN_PLACE or not isinstance(source, Node) or len(source.users) != 1:
        return False
    return source.target in _NOT_NEEDED_BACK


def _is_alike(old: Tensor, new: Tensor) -> bool:
    same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return same and old.stride() == new.stride() and old.untyped_storage().nbytes() == new.untyped_storage().nbytes()


def _in_place_forms(node: Node) -> list[tuple[Callable[..., Any], tuple[int, ...]]]:
    """Return the operator that writes into an input instead, and the order of arguments in which it takes them."""
    if not is_aten(node) or find_written(node) or is_view(node) or node.kwargs:
        return []
    assert isinstance(node.target, OpOverload)
    positions = tuple(range(len(node.args)))
    if node.target is torch.ops.mkldnn._convolution_pointwise.binary:
        return [(torch.ops.mkldnn._convolution_pointwise_.binary, (1, 0, *positions[2:]))]
    namespace, _, name = node.target._schema.name.partition("::")
    packet = getattr(torch.ops.aten, f"{name}_", None) if namespace == "aten" else None
    overload = node.target._overloadname
    if packet is None or overload not in packet.overloads():
        return []
    target = getattr(packet, overload)
    is_same = len(target._schema.arguments) == len(node.target._schema.arguments)
    return [(target, positions)] if is_same and _writes_first(target) else []


def _writes_first(target: OpOverload) -> bool:
    info = target._schema.arguments[0].alias_info
    return info is not None and info.is_write
