"""What each node of a captured graph produces and what it takes, found without computing it.

Fusing needs the shapes; the memory passes need the storages: which values share one, how many bytes it has, and what an
operator takes in between for itself. All of it comes from running the graph on fake tensors, which know sizes, strides
and sharing and hold no data. A graph whose shapes depend on data (`nonzero`, `.item()`) cannot be run so; it is run
once on copies of the example inputs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import Argument, Target

from deepseek.compiler.passes.memory.peak_tracking import StorageTracker
from deepseek.core.errors import ConfigError

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
# Kernels that torch cannot run on fake tensors: their results are like the value that they add to.
_WITHOUT_SHAPES: dict[Any, Callable[[Any], Any]] = {
    torch.ops.mkldnn._convolution_pointwise.binary: lambda args: torch.empty_like(args[1]),
    torch.ops.mkldnn._convolution_pointwise_.binary: lambda args: args[0],
}


@dataclass(frozen=True)
class Observed:
    """The observed value and scratch memory of each node."""

    values: dict[fx.Node, Any]
    """Its value, of which shape, dtype, device and storage mean something, and numbers do not."""
    scratch_bytes: dict[fx.Node, int]
    """Bytes that it takes for itself and gives back before it ends."""


def observe(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Observed:
    """Run `graph_module` without computing, on one value for each placeholder.

    Raises `ConfigError` for another number of values.
    """
    num_expected = sum(node.op == "placeholder" for node in graph_module.graph.nodes)
    if len(inputs) != num_expected:
        raise ConfigError(
            f"{len(inputs)} example inputs were given and the graph takes {num_expected}; pass one per placeholder"
        )
    try:
        return _run_fake(graph_module, inputs)
    except _DATA_DEPENDENT:
        return _run_on_copies(graph_module, inputs)


def stand_in(values: dict[fx.Node, Any], operand: Any) -> Any:
    """Something of the shape of `operand`, for a look inside the branch that it is handed to."""
    value = values[operand] if isinstance(operand, fx.Node) else operand
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


class _ValueRecorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, graph_module: fx.GraphModule, tracker: StorageTracker) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.seen = Observed({}, {})
        self._tracker = tracker
        self._constants: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self._tracker.restart()
        value = super().run_node(n)
        self.seen.values[n] = value
        self.seen.scratch_bytes[n] = self._tracker.peak_bytes - self._tracker.alive_bytes
        return value

    def call_module(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """Only the checks of input shapes that `torch.export` adds; they have no value."""
        return None

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        if str(target) not in self._constants:
            value = super().get_attr(target, args, kwargs)
            self._constants[str(target)] = self.take(value) if isinstance(value, Tensor) else value
        return self._constants[str(target)]

    def take(self, value: Tensor) -> Tensor:
        """Return a constant or an input as this run may use it."""
        return value.detach().clone()


class _FakeValueRecorder(_ValueRecorder):
    def __init__(self, graph_module: fx.GraphModule, tracker: StorageTracker, mode: FakeTensorMode) -> None:
        super().__init__(graph_module, tracker)
        self.mode = mode

    def take(self, value: Tensor) -> Tensor:
        return value if value.is_mkldnn else self.mode.from_tensor(value, static_shapes=True)

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        if target in _WITHOUT_SHAPES:
            return _WITHOUT_SHAPES[target](args)
        return super().call_function(target, args, kwargs)


def _without_numbers() -> ShapeEnv:
    """Return the shape environment that loops need; an operator whose result depends on numbers is still refused."""
    return ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)


@torch.no_grad()
def _run_fake(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Observed:
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=_without_numbers()) as mode, StorageTracker() as tracker:
        return _run(_FakeValueRecorder(graph_module, tracker, mode), inputs)


@torch.no_grad()
def _run_on_copies(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Observed:
    with StorageTracker() as tracker:
        return _run(_ValueRecorder(graph_module, tracker), inputs)


def _run(recorder: _ValueRecorder, inputs: Sequence[Any]) -> Observed:
    taken = [recorder.take(value) if isinstance(value, Tensor) else value for value in inputs]
    recorder.run(*taken, enable_io_processing=False)
    return recorder.seen
