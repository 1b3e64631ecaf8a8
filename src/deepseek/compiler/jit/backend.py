"""Between the tracer and the backend: a captured graph is made repeatable, optimized where that is safe, and compiled.

`compile_graph` is the backend that `jit` hands to `torch.compile`. Training graphs go to the backend as they are
(with repeatable random numbers). For inference the graph is captured once more at the level of ATen
operators when its first real inputs arrive, with parameters inside, and passes through `optimizing.optimize`;
parameters that change afterwards (loading weights, an optimizer's step) are noticed by their version counters, and
the passes run again.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from deepseek.compiler.jit.jit_options import JitOptions
from deepseek.compiler.jit.tracing.random_numbers import has_control_flow, seed_branches_
from deepseek.compiler.jit.tracing.sites import ControlFlowError
from deepseek.compiler.jit.tracing.speculation import check_watched, erase_probes_
from deepseek.compiler.passes.memory.recomputation import eager_with_budget, inductor_with_budget
from deepseek.compiler.passes.optimizing import OptimizationReport, optimize
from deepseek.compiler.runtimes.backends.dynamo import COMPILERS, find_compiler
from deepseek.core.errors import ConfigError


@dataclass
class Captured:
    """The graphs of one call, with the inputs that they were first given."""

    graphs: list[tuple[fx.GraphModule, list[Any], bool]] = field(default_factory=list)


def prepare_(graph_module: fx.GraphModule) -> None:
    """Free a graph of what was only looked at, and in training of random numbers that cannot repeat."""
    check_watched()
    erase_probes_(graph_module)
    if torch.is_grad_enabled():
        seed_branches_(graph_module)


def compile_graph(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: JitOptions, reports: list[Any]
) -> Callable[..., Any]:
    """Compile a graph as the backend of `jit`."""
    prepare_(graph_module)
    if torch.is_grad_enabled() and has_control_flow(graph_module):
        return refuse_second_gradients(run_backend(graph_module, example_inputs, options))
    return compile_prepared(graph_module, example_inputs, options=options, reports=reports)


def refuse_second_gradients(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Make gradients of gradients an error: torch 2.13 drops, in silence, what passes through a branch or a loop."""

    def run(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        known = {id(value) for value in inputs}
        for output in outputs:
            if isinstance(output, Tensor) and output.requires_grad and id(output) not in known:
                output.register_hook(_refuse_second_gradient)
        return outputs

    return run


def _refuse_second_gradient(gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        raise ControlFlowError(
            "create_graph=True asks for gradients of gradients through a tensor condition or loop that ds.jit compiled,"
            " and torch gives wrong ones; call the function without ds.jit where they are needed"
        )


def compile_prepared(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: JitOptions, reports: list[Any]
) -> Callable[..., Any]:
    """Compile a graph, optimized where that is safe."""
    is_fixed = all(isinstance(value, Tensor) for value in example_inputs) and not _has_symbols(example_inputs)
    if options.backend in COMPILERS:  # runtimes of their own, which fuse for themselves and read no kernels of oneDNN
        return run_backend(graph_module, example_inputs, options)
    has_passes = has_tensor_parameters(graph_module) or bool(options.devices)
    if torch.is_grad_enabled() or not options.optimize or not is_fixed or not has_passes:
        return run_backend(graph_module, example_inputs, options)
    return Optimizing(graph_module, options, reports)


def _has_symbols(inputs: Sequence[Any]) -> bool:
    return any(isinstance(size, torch.SymInt) for value in inputs for size in value.shape)


def run_backend(graph_module: fx.GraphModule, inputs: Sequence[Any], options: JitOptions) -> Callable[..., Any]:
    """Return the graph compiled by the backend that the user named."""
    compiler: Any = find_compiler(options.backend)
    if callable(options.backend) and options.options:
        compiler = functools.partial(options.backend, options=options.options)
    if options.memory_budget is not None and torch.is_grad_enabled():
        compiler = choose_budgeted(options)
    elif compiler == "inductor":
        from torch._inductor.compile_fx import compile_fx

        compiler = functools.partial(compile_fx, config_patches=options.options)
    elif isinstance(compiler, str):
        compiler = torch._dynamo.lookup_backend(compiler)
    compiled: Callable[..., Any] = compiler(graph_module, list(inputs))
    return compiled


def choose_budgeted(options: JitOptions) -> Callable[..., Any]:
    """Return the backend that keeps no more than the memory budget for backward."""
    backends: dict[Any, Any] = {
        "inductor": functools.partial(inductor_with_budget, options=options.options),
        "aot_eager": eager_with_budget,
    }
    if options.backend not in backends:
        raise ConfigError(
            f"memory_budget was given with the backend {options.backend!r}; it works with {', '.join(backends)}"
        )
    budgeted: Callable[..., Any] = backends[options.backend](options.memory_budget)
    return budgeted


def find_static(graph_module: fx.GraphModule) -> list[int]:
    """Return the indices of the inputs that are a module's parameters and buffers."""
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return [
        index
        for index, node in enumerate(inputs)
        if (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
    ]


def has_tensor_parameters(graph_module: fx.GraphModule) -> bool:
    """Return whether any parameter or buffer comes in."""
    return bool(find_static(graph_module))


class Optimizing:
    """A graph for inference that is optimized when its first inputs arrive, and again when its parameters change."""

    def __init__(self, graph_module: fx.GraphModule, options: JitOptions, reports: list[Any]) -> None:
        self.graph_module = graph_module
        self.options = options
        self.reports = reports
        self.static = find_static(graph_module)
        self.versions: tuple[Any, ...] | None = None
        self.compiled: Any = None
        self.writes = False  # the graph writes into its own parameters or buffers, and is left as it is

    def __call__(self, *inputs: Any) -> Any:
        before = self._read_versions(inputs)
        if self.writes:
            return self.compiled(*inputs)
        if before != self.versions:
            self.compiled = self._optimize(inputs)
            self.versions = before
        result = self.compiled(*_others(inputs, self.static))
        if self._read_versions(inputs) != before:  # a batch norm in training mode, a buffer that counts
            self.writes = True
            self.compiled = run_backend(self.graph_module, inputs, self.options)
        return result

    def _read_versions(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple((id(inputs[index]), inputs[index]._version) for index in self.static)

    def _optimize(self, inputs: Sequence[Any]) -> Any:
        graph = inline_parameters(self.graph_module, inputs, self.static)
        others = _others(inputs, self.static)
        try:
            kernels, devices = kernels_of(self.options), self.options.device_names
            optimized = optimize(graph, others, is_training=False, kernels=kernels, devices=devices)
        except Exception as error:  # noqa: BLE001 - the graph is right as it is; the user is told what is missing
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"the graph is compiled as it was captured, since the passes failed: {reason}", stacklevel=2)
            return run_backend(graph, others, self.options)
        self.reports.append(optimized.report)
        return run_backend(optimized.graph_module, others, self.options)


def kernels_of(options: JitOptions) -> Literal["eager", "inductor"]:
    """Who will run the operators of an optimized graph."""
    return "eager" if options.backend in ("eager", "aot_eager") else "inductor"


def _others(inputs: Sequence[Any], static: Sequence[int]) -> list[Any]:
    hidden = set(static)
    return [value for index, value in enumerate(inputs) if index not in hidden]


def inline_parameters(graph_module: fx.GraphModule, inputs: Sequence[Any], static: Sequence[int]) -> fx.GraphModule:
    """Return the graph at the level of ATen operators, with the parameters at the indices `static` inside it."""
    held = dict.fromkeys(static)
    root = nn.Module()
    for index in held:
        name = f"parameter_{index}"
        if isinstance(inputs[index], nn.Parameter):
            root.register_parameter(name, inputs[index])
        else:
            root.register_buffer(name, inputs[index])
    traced = make_fx(graph_module, tracing_mode="fake", pre_dispatch=True)(*inputs)
    for child, module in traced.named_children():
        root.add_module(child, module)
    graph = traced.graph
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        if index in held:
            with graph.inserting_before(node):
                inside = graph.create_node("get_attr", f"parameter_{index}")
            inside.meta = dict(node.meta)
            node.replace_all_uses_with(inside)
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "get_attr" and not hasattr(root, str(node.target)):
            setattr(root, str(node.target), getattr(traced, str(node.target)))
    return fx.GraphModule(root, graph)


class _Stop(Exception):  # noqa: N818 - not an error
    """Raised where a captured graph would run."""


def capture_inputs(
    function: Callable[..., Any], captured: Captured, args: Sequence[Any], kwargs: dict[str, Any], options: JitOptions
) -> None:
    """Trace `function` on these arguments and keep its graphs with their inputs, in `captured`.

    With one graph nothing runs; between several graphs they must.
    """

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        prepare_(graph_module)
        is_training = torch.is_grad_enabled()

        def run(*inputs: Any) -> Any:
            captured.graphs.append((graph_module, list(inputs), is_training))
            if options.fullgraph:
                raise _Stop
            return graph_module.forward(*inputs)

        return run

    compiled = torch.compile(function, backend=backend, fullgraph=options.fullgraph, dynamic=options.dynamic)
    try:
        compiled(*args, **kwargs)
    except _Stop:
        return


def report_on(
    graph_module: fx.GraphModule, inputs: Sequence[Any], options: JitOptions, *, is_training: bool
) -> OptimizationReport:
    """Return the report of the passes on a captured graph."""
    static = find_static(graph_module)
    with torch.no_grad():
        graph = inline_parameters(graph_module, inputs, static)
        devices = () if is_training else options.device_names
        others = _others(inputs, static)
        kernels = kernels_of(options)
        return optimize(graph, others, is_training=is_training, kernels=kernels, devices=devices).report
