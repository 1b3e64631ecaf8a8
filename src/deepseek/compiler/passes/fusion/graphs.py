"""The graph that is being rewritten, and what a rule may do with it: read constants, add calls, propose a rewrite.

A rule looks at one node and returns a `ProposedRewrite` (these nodes could become those), a `Refusal` (this looks like
mine and cannot be done, because) or `None`. It never removes anything itself: the driver in `rewrite_rules.py` lets it
emit, compares numbers, and then removes either the old nodes or the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from deepseek.compiler.passes.effects import find_root, find_written, is_opaque
from deepseek.compiler.passes.memory.peak_tracking import tensors_in

Kernels = Literal["eager", "inductor"]


class Rewriting:
    """A copy of a captured graph while rules work on it."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        values: dict[Node, Any],
        *,
        kernels: Kernels,
        bound: dict[Node, Tensor] | None = None,
    ) -> None:
        """`bound` are placeholders that always get the same tensor: weights that a branch is handed."""
        self.graph_module = graph_module
        self.values = values
        self.kernels = kernels
        self.bound = bound or {}
        self.emitted: list[Node] = []
        written = [source for node in self.graph.nodes for source in find_written(node)]
        paths = {str(find_root(node).target) for node in written if find_root(node).op == "get_attr"}
        self._written_storages = {_storage_of(read_attribute(graph_module, path)) for path in paths}
        self._num_constants = 0

    @property
    def graph(self) -> fx.Graph:
        """Return the graph itself."""
        return self.graph_module.graph

    def constant(self, node: Any) -> Tensor | None:
        """Return the tensor that `node` always stands for; `None` where it is computed, or written to."""
        if node in self.bound:
            return self.bound[node]
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        value = read_attribute(self.graph_module, str(node.target))
        if not isinstance(value, Tensor) or (_storage_of(value) or 0) in self._written_storages:
            return None
        return value.detach()

    def storages(self, node: Node) -> set[int]:
        """Return keys of the storages that hold a node's value."""
        return {key for tensor in tensors_in(self.values.get(node)) if (key := _storage_of(tensor)) is not None}

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the shape of the value of `node` on the example inputs."""
        return tuple(self.values[node].shape)

    def add_constant(self, value: Tensor, name: str) -> Node:
        """Return a node for `value`, which becomes a buffer of the graph's module."""
        while hasattr(self.graph_module, f"fused_{name}_{self._num_constants}"):
            self._num_constants += 1
        target = f"fused_{name}_{self._num_constants}"
        self.graph_module.register_buffer(target, value)
        return self._add(self.graph.get_attr(target), value)

    def add_call(self, target: Callable[..., Any], *args: Any, like: Any) -> Node:
        """Return a call of `target`, whose value has the shape of `like`."""
        return self._add(self.graph.call_function(target, args), like)

    def _add(self, node: Node, value: Any) -> Node:
        self.values[node] = value
        self.emitted.append(node)
        return node


@dataclass(frozen=True)
class ProposedRewrite:
    """Nodes that could be replaced, and how."""

    replaced: tuple[Node, ...]
    """In the order of the graph."""
    results: tuple[Node, ...]
    """Nodes of `replaced` whose values others read."""
    inputs: tuple[Node, ...]
    """The computed values that `replaced` reads."""
    emit: Callable[[], tuple[Node, ...]]
    """Adds the new nodes and returns one for each of `results`."""
    has_batch: bool = True
    """Whether the first dim of each input counts examples, so that few of them show what many would."""
    after: dict[Node, Callable[..., Any]] = field(default_factory=dict)
    """Readers of the results that must call another operator from now on."""


@dataclass(frozen=True)
class Refusal:
    """A rewrite that suggests itself and must not be done."""

    nodes: tuple[Node, ...]
    reason: str


Match = ProposedRewrite | Refusal | None


def why_not_movable(candidate: ProposedRewrite, graph: Rewriting) -> str | None:
    """Say why the inputs of a candidate cannot be read at another of its nodes; `None` where they can.

    Memory decides, as it was seen when the graph ran without computing: a write through any alias of an input counts.
    """
    first, last = candidate.replaced[0], candidate.replaced[-1]
    inside = set(candidate.replaced)
    read = {storage for node in candidate.inputs for storage in graph.storages(node)}
    for node in _walk(first, last):
        if node in inside:
            continue
        written = {storage for source in find_written(node) for storage in graph.storages(source)}
        if is_opaque(node) or read & written:
            return f"{node.name} may write into what it reads, between its first and its last operator"
    return None


def read_attribute(module: nn.Module, path: str) -> Any:
    """Return the attribute at the dotted `path` below `module`."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _storage_of(value: Any) -> int | None:
    """Return a key of the tensor's storage; `None` for a value without one."""
    has_storage = isinstance(value, Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if has_storage else None


def to_float64(value: Tensor) -> Tensor:
    """Return a floating-point tensor in the precision in which weights are folded."""
    return value.to(torch.float64) if value.is_floating_point() else value


def _walk(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next
