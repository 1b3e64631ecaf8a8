"""A captured graph over several devices: what its operators cost on each, and the graph with the transfers in it.

    placed = place_graph(graph_module, inputs, ["cpu", "cuda"])
    placed.graph_module(*inputs)
    print(placed.placement)

`optimize` calls this where `ds.jit` was given several devices. Every operator is timed on every device that runs it,
with the values that reach it, and every pair of devices with a small and a large block; `assignment.py` chooses, with
the fastest single device as the floor. Operators stay in their order. A graph that writes into its values is refused: a
copy on another device would not see it. `torch.export` leaves none of that after `run_decompositions()`.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.utils._pytree import tree_map

from deepseek.compiler.passes.effects import find_written, is_opaque
from deepseek.compiler.passes.fusion.graphs import read_attribute
from deepseek.compiler.passes.fusion.rewrite_rules import copy_graph
from deepseek.compiler.passes.memory.peak_tracking import tensors_in
from deepseek.compiler.passes.placement.assignment import Link, Placement, TimedOperation, Workload, place
from deepseek.compiler.passes.shape_inference import observe
from deepseek.core.errors import ConfigError

_NUM_RUNS = 3
_SMALL_BYTES, _LARGE_BYTES = 1 << 10, 1 << 24


@dataclass(frozen=True)
class PlacedGraph:
    """A graph over devices, and why it is placed so."""

    graph_module: fx.GraphModule
    placement: Placement | str
    """The chosen placement, or why the graph stays where it is."""


def place_graph(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    devices: Sequence[str],
    *,
    measure: Callable[..., Workload] | None = None,
) -> PlacedGraph:
    """Put each operator on the device where the whole graph is fastest; results come back on the device of the inputs.

    `inputs` has one value per placeholder. `measure` replaces `measure_workload` where costs are known. The graph is
    the one that was given where one device alone is fastest and holds the inputs already, and where it writes in place
    or branches. Raises `ConfigError` for a device that this machine does not have.
    """
    names = list(dict.fromkeys(_find_device(device) for device in devices))
    if len(names) < 2:
        return PlacedGraph(graph_module, f"everything on {names[0]}, the only device given")
    refusal = _explain_writes(graph_module)
    if refusal is not None:
        return PlacedGraph(graph_module, refusal)
    home = _name(next((tensor.device for tensor in tensors_in(list(inputs))), torch.device(names[0])))
    workload = (measure or measure_workload)(graph_module, inputs, names, output_device=home)
    placement = place(workload)
    if set(placement.devices.values()) <= {home}:
        return PlacedGraph(graph_module, placement)
    known = copy_graph(graph_module)
    values = {node.name: value for node, value in observe(graph_module, inputs).values.items()}
    for node in known.graph.nodes:
        node.meta.setdefault("val", values.get(node.name))
    return PlacedGraph(apply_placement(known, placement.devices, output_device=home), placement)


def list_devices() -> tuple[str, ...]:
    """List the devices of this machine that torch can compute on: the CPU, and every GPU."""
    return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))


def _find_device(name: str) -> str:
    """Return the name that torch gives to a device: `cpu:0` is `cpu`."""
    try:
        return _name(torch.zeros(1, device=name).device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device {name!r} cannot be used here ({reason}); choose among {', '.join(list_devices())}"
        ) from error


def measure_workload(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    devices: Sequence[str],
    *,
    output_device: str = "cpu",
    links: Mapping[tuple[str, str], Link] | None = None,
) -> Workload:
    """Run `graph_module` on `inputs` operator by operator on each device, and time it and the links.

    `links` replaces the measurement where they are known. Raises `ConfigError` for a graph that writes in place.
    """
    _refuse_writes(graph_module)
    runner = _Timer(graph_module, devices)
    runner.run(*inputs, enable_io_processing=False)
    operations = tuple(
        TimedOperation(
            node.name,
            runner.times_s[node],
            tuple(source.name for source in node.all_input_nodes if source.op in ("placeholder", "call_function")),
            runner.sizes_bytes[node],
            node.all_input_nodes[0].name if node.target is operator.getitem else None,
        )
        for node in graph_module.graph.nodes
        if node.op == "call_function"
    )
    given = {
        node.name: (runner.device_of_input[node], runner.sizes_bytes[node])
        for node in graph_module.graph.nodes
        if node.op == "placeholder"
    }
    (output,) = graph_module.graph.find_nodes(op="output")
    results = {node.name: output_device for node in output.all_input_nodes if node.op != "get_attr"}
    if links is None:
        links = {(one, two): measure_link(one, two) for one in devices for two in devices if one != two}
    return Workload(operations, links, given, results)


def measure_link(source: str, target: str) -> Link:
    """Return the latency and bandwidth between two devices."""
    small_s, large_s = (
        _time(lambda block: block.to(target), torch.zeros(size, dtype=torch.uint8, device=source), (source, target))
        for size in (_SMALL_BYTES, _LARGE_BYTES)
    )
    per_byte_s = max((large_s - small_s) / (_LARGE_BYTES - _SMALL_BYTES), 1e-15)
    return Link(small_s, 1 / per_byte_s)


def apply_placement(
    graph_module: fx.GraphModule, devices: Mapping[str, str], *, output_device: str = "cpu"
) -> fx.GraphModule:
    """Copy the graph so that each operation of `devices` runs on its device; results come back on `output_device`.

    Weights are put on the device that reads them, once; values go where they are read, once each.
    """
    _refuse_writes(graph_module)
    placed = copy_graph(graph_module)
    homes = {node: devices[node.name] for node in placed.graph.nodes if node.op == "call_function"}
    copies: dict[tuple[Node, str], Node] = {}
    for node in list(placed.graph.nodes):
        if node.op in ("call_function", "output"):
            home = homes.get(node, output_device)
            _send_inputs(placed, node, home, homes, copies)
            _create_on(node, home)
    placed.graph.eliminate_dead_code()
    placed.graph.lint()
    placed.recompile()
    return placed


def _send_inputs(
    placed: fx.GraphModule,
    node: Node,
    home: str,
    homes: dict[Node, str],
    copies: dict[tuple[Node, str], Node],
) -> None:
    for source in node.all_input_nodes:
        if homes.get(source) == home or not _is_tensor(placed, source):
            continue
        if (source, home) not in copies:
            with placed.graph.inserting_before(node):
                copies[source, home] = _send(placed, source, home)
        node.replace_input_with(source, copies[source, home])


def _send(placed: fx.GraphModule, source: Node, home: str) -> Node:
    if source.op != "get_attr":
        dtype = source.meta["val"].dtype
        return placed.graph.call_function(torch.ops.aten.to.device, (source, torch.device(home), dtype))
    name = f"placed_{str(source.target).replace('.', '_')}_{home.replace(':', '_')}"
    if not hasattr(placed, name):
        value = read_attribute(placed, str(source.target))
        placed.register_buffer(name, value.detach().to(home), persistent=False)
    return placed.graph.get_attr(name)


def _is_tensor(placed: fx.GraphModule, node: Node) -> bool:
    value = read_attribute(placed, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
    return isinstance(value, Tensor)


def _refuse_writes(graph_module: fx.GraphModule) -> None:
    refusal = _explain_writes(graph_module)
    if refusal is not None:
        raise ConfigError(f"{refusal}; capture the graph with torch.export and run_decompositions()")


def _explain_writes(graph_module: fx.GraphModule) -> str | None:
    """Say why a graph cannot be spread over devices; `None` where it can."""
    writer = next((node for node in graph_module.graph.nodes if find_written(node) or _is_opaque_call(node)), None)
    if writer is None:
        return None
    return f"{writer.name} may write into a value, of which another device would keep an old copy"


def _is_opaque_call(node: Node) -> bool:
    """Return whether `node` may write into anything."""
    return node.op != "call_module" and is_opaque(node)


def _create_on(node: Node, home: str) -> None:
    """Let an operator that makes a tensor from nothing make it on its device."""
    if "device" in node.kwargs:
        node.kwargs = {**node.kwargs, "device": torch.device(home)}


class _Timer(fx.Interpreter):
    """Runs a graph on its own devices and times each operator on each of several."""

    def __init__(self, graph_module: fx.GraphModule, devices: Sequence[str]) -> None:
        super().__init__(graph_module)
        self.devices = devices
        self.times_s: dict[Node, dict[str, float]] = {}
        self.sizes_bytes: dict[Node, int] = {}
        self.device_of_input: dict[Node, str] = {}

    @torch.no_grad()
    def run_node(self, n: Node) -> Any:
        if n.op == "call_module":
            return None
        if n.op == "call_function":
            times_s = {device: self._time_on(n, device) for device in self.devices}
            self.times_s[n] = {device: time_s for device, time_s in times_s.items() if time_s is not None}
        value = super().run_node(n)
        tensors = tensors_in(value)
        if n.op in ("placeholder", "call_function"):
            self.sizes_bytes[n] = sum(tensor.nbytes for tensor in tensors)
        if n.op == "placeholder":
            self.device_of_input[n] = _name(tensors[0].device) if tensors else self.devices[0]
        return value

    def _time_on(self, node: Node, device: str) -> float | None:
        """Time an operator; `None` on a device that has no kernel for it, as the CPU's own kernels on a GPU."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        taken = [*args, *kwargs.values()]
        if any(tensor.layout != torch.strided and _name(tensor.device) != device for tensor in tensors_in(taken)):
            return None  # weights that are laid out for one device
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device(device)}
        moved = tree_map(lambda value: _copy(value, device) if isinstance(value, Tensor) else value, (args, kwargs))
        assert callable(node.target)
        target = node.target
        try:
            return _time(lambda taken: target(*taken[0], **taken[1]), moved, (device,))
        except NotImplementedError:
            return None


def _copy(value: Tensor, device: str) -> Tensor:
    return value.detach().clone() if _name(value.device) == device else value.detach().to(device)


def _name(device: torch.device) -> str:
    return device.type if device.index in (None, 0) else str(device)


def _time(run: Callable[[Any], object], argument: Any, devices: Sequence[str]) -> float:
    """Return the time of the shortest of a few runs."""
    times_s = []
    for _ in range(_NUM_RUNS + 1):
        _wait_for(devices)
        began_s = time.perf_counter()
        run(argument)
        _wait_for(devices)
        times_s.append(time.perf_counter() - began_s)
    return min(times_s[1:])


def _wait_for(devices: Sequence[str]) -> None:
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
