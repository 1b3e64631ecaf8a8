"""What each node of a captured graph produces, found without computing it.

Fusing needs the shapes, the memory passes the storages: which values share one, and how many bytes it has. Both come
from running the graph on fake tensors, which know sizes, strides and sharing and hold no data. A graph whose shapes
depend on data (`nonzero`, `.item()`) cannot be run so; it is run on copies of the example inputs instead, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.node import Argument, Target

from deepseek.compiler.effects import find_root, find_written
from deepseek.core.errors import ConfigError

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


def propagate(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """The value of every node for `inputs`, of which only shape, dtype, device and storage mean anything.

    Raises `ConfigError` where the graph does not take these inputs.
    """
    check_inputs(graph_module, inputs)
    try:
        return _run_fake(graph_module, inputs)
    except _DATA_DEPENDENT:
        return _run_on_copies(graph_module, inputs)


def check_inputs(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Raise `ConfigError` unless there is one input per placeholder."""
    num_expected = sum(node.op == "placeholder" for node in graph_module.graph.nodes)
    if len(inputs) != num_expected:
        raise ConfigError(
            f"{len(inputs)} example inputs were given and the graph takes {num_expected}; pass one per placeholder"
        )


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a node's value, which may be a tuple of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in tensors_in(each)]
    return []


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self._constants: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]

    def call_module(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """Only the checks of input shapes that `torch.export` adds; they need no answer."""
        return None

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        if str(target) not in self._constants:
            value = super().get_attr(target, args, kwargs)
            self._constants[str(target)] = self.take(value) if isinstance(value, Tensor) else value
        return self._constants[str(target)]

    def take(self, constant: Tensor) -> Tensor:
        """A constant as this run may use it."""
        raise NotImplementedError


class _FakeRecorder(_Recorder):
    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self.mode = mode

    def take(self, constant: Tensor) -> Tensor:
        return self.mode.from_tensor(constant, static_shapes=True)


class _CopyingRecorder(_Recorder):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        written = {find_root(each) for node in graph_module.graph.nodes for each in find_written(node)}
        self._has_writes = bool(written)

    def take(self, constant: Tensor) -> Tensor:
        return constant.detach().clone() if self._has_writes else constant.detach()


def _run_fake(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        recorder = _FakeRecorder(graph_module, mode)
        fakes = [_fake(mode, each) for each in inputs]
        recorder.run(*fakes, enable_io_processing=False)
    return recorder.values


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


@torch.no_grad()
def _run_on_copies(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    recorder = _CopyingRecorder(graph_module)
    copies = [each.detach().clone() if isinstance(each, Tensor) else each for each in inputs]
    recorder.run(*copies, enable_io_processing=False)
    return recorder.values
