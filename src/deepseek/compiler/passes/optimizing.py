"""All passes over one captured graph, in their order: fusion, devices where there are several, then memory.

    optimized = optimize(graph_module, example_inputs, is_training=False)
    optimized.graph_module(*example_inputs)
    print(optimized.report)

`@ds.jit` calls this with the graph it captured, and shows the report in `explain()`. The graph that comes in stays as
it was; the one that comes out takes the same inputs and shares the tensors that were not rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from deepseek.compiler.passes.effects import is_control_flow, is_opaque
from deepseek.compiler.passes.fusion.graphs import Kernels
from deepseek.compiler.passes.fusion.rewrite_rules import FusionReport, copy_graph, fuse_graph
from deepseek.compiler.passes.memory.peak import MemoryReport, lower_peak
from deepseek.compiler.passes.memory.recomputation import eager_with_budget, inductor_with_budget
from deepseek.compiler.passes.placement.assignment import Placement
from deepseek.compiler.passes.placement.devices import place_graph
from deepseek.core.errors import ConfigError

_GUARDS = "_guards_fn"  # the checks of input shapes that torch.export adds


@dataclass(frozen=True)
class OptimizationReport:
    """A report of how the passes changed a graph."""

    fusion: FusionReport
    memory: MemoryReport
    placement: Placement | str | None = None
    """Which device runs what, or why the graph stays where it is; `None` where one device was given."""

    def __str__(self) -> str:
        lines = [str(self.fusion), str(self.memory)]
        lines += [f"devices: {self.placement}"] if self.placement is not None else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Optimized:
    """A rewritten graph and what was done to it."""

    graph_module: fx.GraphModule
    report: OptimizationReport
    run: Callable[..., Any]
    """The graph itself, or its compiled form where a memory budget was given."""


def optimize(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    is_training: bool,
    memory_budget: float | None = None,
    kernels: Kernels = "inductor",
    devices: Sequence[str] = (),
) -> Optimized:
    """Rewrite a captured graph so that it computes the same with fewer operators and less memory.

    `graph_module` holds ATen operators, as `torch.export` captures them. `example_inputs` are those of the graph, one
    per placeholder or as its `forward` takes them. With `is_training` nothing is folded. Otherwise the result is for
    inference: its fused kernels have no gradient. `kernels` says who runs it: a code generator like `inductor`, to
    which activations are left, or `eager`, operator by operator, for which they join the kernels of oneDNN.
    `memory_budget`, for training, is the share in (0, 1] of what the backward pass needs again that may be kept; the
    rest is computed twice by `run`. With several `devices`, for inference, operators are timed on each and go where the
    graph is fastest; results come back on the device of the inputs. Raises `ConfigError` for a graph of other
    operators, for a budget where there is no backward pass, and for devices where there is one.
    """
    refuse_other_operators(graph_module)
    if memory_budget is not None and not is_training:
        raise ConfigError(f"memory_budget={memory_budget:g} is for training, where values are kept; leave it out here")
    inputs = flatten_inputs(graph_module, example_inputs)
    if is_training and len(devices) > 1:
        raise ConfigError(f"devices={tuple(devices)} is for inference, where no gradients flow back; leave it out here")
    fused = fuse_graph(copy_graph(graph_module), inputs, is_training=is_training, kernels=kernels)
    optimized = fused.graph_module
    placement: Placement | str | None = None
    if len(devices) > 1:
        placed = place_graph(optimized, inputs, devices)
        optimized, placement = placed.graph_module, placed.placement
    memory = lower_peak(optimized, inputs, is_training=is_training)
    run = optimized if memory_budget is None else _keep_less(optimized, memory_budget, kernels)
    return Optimized(optimized, OptimizationReport(fused.report, memory, placement), run)


def _keep_less(graph_module: fx.GraphModule, memory_budget: float, kernels: Kernels) -> Callable[..., Any]:
    backends = {"eager": eager_with_budget, "inductor": inductor_with_budget}
    return torch.compile(graph_module, backend=backends[kernels](memory_budget))


def flatten_inputs(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """One value per placeholder, from those or from the arguments of `forward`."""
    num_expected = sum(node.op == "placeholder" for node in graph_module.graph.nodes)
    return list(inputs) if len(inputs) == num_expected else list(graph_module.graph.process_inputs(*inputs))


def refuse_other_operators(graph_module: fx.GraphModule) -> None:
    """Raise `ConfigError` for a graph of Python functions or modules, in which no pass would find anything."""
    for node in graph_module.graph.nodes:
        if _is_of_python(node):
            raise ConfigError(
                f"the graph calls {node.target} and the passes read ATen operators; capture it with torch.export"
            )


def _is_of_python(node: fx.Node) -> bool:
    if node.op == "call_module":
        return node.target != _GUARDS
    if node.op == "call_function" and is_opaque(node) and not is_control_flow(node):
        module = getattr(node.target, "__module__", "") or ""
        return module == "torch" or module.startswith(("torch.nn", "torch._C"))
    return node.op == "call_method"
