"""`@ds.jit`: Python with control flow on tensors becomes one graph, and runs on the backend of your choice.

    @ds.jit
    def f(x):
        if x.mean() > 0:
            return torch.relu(x)
        return x * 0.1

The function (a method, a module, a class of modules) is rewritten (`rewriting`): conditions, loops and exits that
depend on a tensor become `torch.cond` and `while_loop`, those that are Python stay Python, and what it calls is
rewritten as it is reached. `torch.compile` traces and guards the result, always as one graph; the captured graph is
freed of what was only looked at, its random operators are made repeatable, and in inference it passes through
`optimizing` (fusion, memory) before the backend compiles it. What cannot be rewritten is an error with file, line and
a hint, or, with `fullgraph=False`, a warning and a graph break at that place. `explain()` tells all of it.

Measured on torch 2.13: the same functions under plain `torch.compile` break the graph at each such place, and
`draft_export` keeps the branch that it saw.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import torch
import torch._dynamo.config as dynamo
import torch.nn.modules.module as hooks
from torch import nn
from torch._dynamo.utils import graph_break_reasons
from torch._higher_order_ops.utils import setup_compilation_env
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from deepseek.compiler.jit.backend import Captured, capture_inputs, compile_graph
from deepseek.compiler.jit.explanation import Explanation, explain_captured
from deepseek.compiler.jit.jit_options import Backend, Devices, JitOptions
from deepseek.compiler.jit.rewriting.counterparts import ENTRY, keep_counterpart
from deepseek.compiler.jit.rewriting.parsing import describe
from deepseek.compiler.jit.tracing.calls import Rewritable
from deepseek.compiler.jit.tracing.sites import (
    OWN_FILES,
    ControlFlowError,
    GraphBreakWarning,
    Site,
    Trace,
    explain_reason,
    find_refusal,
    last_own_frame,
    recording,
)
from deepseek.compiler.jit.tracing.speculation import register
from deepseek.core.errors import ConfigError, DeepSeekError

Target = TypeVar("Target")
MAX_FRAMES = 10_000
TRACING_FAILURES = (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode)
TORCH_FILES = str(Path(torch.__file__).parent)
RESUMED = "torch_dynamo_resume_in"  # how the tracer calls what follows a graph break
FAILED_CHECK = re.compile(r"^(Runtime assertion failed for expression )?u\d+ >= (?P<size>\d+)( on node .*)?$")
MAX_BREAKS = 64  # places that one function may be broken at before something else must be wrong
MAX_KINDS = 64  # of arguments that one function is compiled for: types, Python values, shapes of different rank


@overload
def jit(
    target: Target,
    *,
    fullgraph: bool = ...,
    backend: Backend = ...,
    dynamic: bool | None = ...,
    options: dict[str, Any] | None = ...,
    optimize: bool = ...,
    memory_budget: float | None = ...,
    devices: Devices = ...,
) -> Target: ...
@overload
def jit(
    *,
    fullgraph: bool = ...,
    backend: Backend = ...,
    dynamic: bool | None = ...,
    options: dict[str, Any] | None = ...,
    optimize: bool = ...,
    memory_budget: float | None = ...,
    devices: Devices = ...,
) -> Callable[[Target], Target]: ...
def jit(
    target: Any = None,
    *,
    fullgraph: bool = True,
    backend: Backend = "inductor",
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    optimize: bool = True,
    memory_budget: float | None = None,
    devices: Devices = (),
) -> Any:
    """Compile a function, a method, a module or a class of modules to one graph, control flow on tensors included.

    `fullgraph=False` turns what cannot be rewritten from an error into a warning and a graph break. `backend`,
    `dynamic` and `options` are those of `torch.compile`. With `optimize`, graphs for inference are fused and freed of
    memory first. `memory_budget`, in training, is the share in (0, 1] of what backward needs again that is kept; the
    rest is computed twice. `devices`, such as `("cpu", "cuda")` or `"present"`, are timed operator by operator, and
    graphs for inference are spread over them where that beats the fastest one alone. A module comes back as one of the
    same class that shares its parameters, buffers and children; a class is changed in place. Raises `ConfigError` for
    what has no Python source (a lambda, a built-in, a generator, a coroutine), and when it is called
    `ControlFlowError`, with file, line and a hint, for what no graph can hold.

    >>> import torch
    >>> @jit(backend="eager")
    ... def absolute(x):
    ...     return x if x > 0 else -x
    >>> absolute(torch.tensor(-3.0))
    tensor(3.)
    """
    chosen = JitOptions(fullgraph, backend, dynamic, options, optimize, memory_budget, devices)
    if target is None:
        return functools.partial(_jit, options=chosen)
    return _jit(target, chosen)


def _jit(target: Any, options: JitOptions) -> Any:
    if isinstance(target, Jitted):
        return target
    if isinstance(target, nn.Module):
        return _jit_module(inspect.unwrap(target), options)  # of a loaded model, the module that it is a face of
    if inspect.isclass(target):
        return _jit_class(target, options)
    if isinstance(target, types.MethodType):
        return Jitted(target.__func__, options).__get__(target.__self__)
    return Jitted(target, options)


def _jit_module(module: nn.Module, options: JitOptions) -> nn.Module:
    """Give a module of the same class with the same parameters, buffers and children, whose forward is compiled."""
    forward = _forward_of(type(module))
    counterpart = copy.copy(module)
    function = forward.function if isinstance(forward, Jitted) else forward
    bound = Jitted(function, options).__get__(counterpart)
    counterpart.__dict__["forward"] = bound
    counterpart.__dict__["explain"] = bound.explain
    return counterpart


def _jit_class(target: type, options: JitOptions) -> type:
    if not issubclass(target, nn.Module):
        raise ConfigError(f"jit was given the class {target.__qualname__}; it takes functions and classes of nn.Module")
    forward = _forward_of(target)
    if not isinstance(forward, Jitted):
        target.forward = Jitted(forward, options)
    return target


def _forward_of(module_class: type) -> Any:
    forward = inspect.getattr_static(module_class, "forward", None)
    if forward is None or getattr(forward, "__name__", "") == "_forward_unimplemented":
        raise ConfigError(f"{module_class.__qualname__} has no forward to compile; define one")
    return forward


def refuse_unwritable(function: Any) -> None:
    """Raise `ConfigError` for what is not a Python function with statements."""
    seen = None
    if inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        seen = "is asynchronous, and a graph has nothing to wait for"
    elif inspect.isgeneratorfunction(function):
        seen = "is a generator, and a graph has no place to pause"
    elif not isinstance(function, types.FunctionType):
        seen = f"is a {type(function).__name__} without Python source"
    elif function.__name__ == "<lambda>":
        seen = "is a lambda, whose place in its line cannot be told"
    if seen is not None:
        raise ConfigError(f"jit was given {describe(function)}, which {seen}; give it a function written with def")


class Jitted(Rewritable):
    """A compiled function; as an attribute of a class, a compiled method."""

    def __init__(self, function: Any, options: JitOptions, owner: Any = None) -> None:
        refuse_unwritable(function)
        self.function = function
        self.options = options
        self.owner = owner
        register()
        self.counterpart = keep_counterpart(function)
        self.trace = Trace(may_break=not options.fullgraph)
        self.reports: list[Any] = []
        self._compiled: Any = None
        self.__signature__ = inspect.signature(function)
        self.__code__ = function.__code__  # what torch.export and debuggers ask for
        functools.update_wrapper(self, function, updated=())

    # ---- as a method

    def __get__(self, instance: Any, owner: Any = None) -> Self:
        if instance is None:
            return self
        return self._bind(instance)

    def _bind(self, owner: Any) -> Self:
        """Return the same compiled function for another owner; the guards tell owners apart."""
        if self._compiled is None:
            self._compiled = self._compile()
        bound = object.__new__(type(self))
        bound.__dict__.update(self.__dict__, owner=owner)
        if owner is not None:
            bound.__signature__ = inspect.signature(types.MethodType(self.function, owner))
        return bound

    def __copy__(self) -> Self:
        return self._bind(self.owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._bind(copy.deepcopy(self.owner, memo) if self.owner is not None else None)

    def __reduce__(self) -> Any:
        return _restore, (self.function.__module__, self.function.__qualname__, self.options, self.owner)

    # ---- running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function; the first call with new types of arguments compiles it."""
        if self.owner is not None:
            args = (self.owner, *args)
        if has_global_hooks():
            self._pass_over_graph()
            return self.function(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return self.counterpart(ENTRY, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._trace_for_export(args, kwargs)
        if self._compiled is None:
            self._compiled = self._compile()
        for _ in range(MAX_BREAKS):
            try:
                with recording(self.trace), tracing(), self._reporting_breaks():
                    return self._compiled(ENTRY, *args, **kwargs)
            except ControlFlowError as error:
                self._break_at(error)
            except Exception as error:  # noqa: BLE001 - raised again, in our words where they help
                failure = _explain_failure(error, self.function)
                if not self._may_start_in_python(error, failure):
                    self._break_at(failure)
                    continue
                warnings.warn(f"no graph runs: {failure}", GraphBreakWarning, stacklevel=2)
                return self.function(*args, **kwargs)
        raise ControlFlowError(f"{describe(self.function)} breaks at more than {MAX_BREAKS} places; split it")

    def _may_start_in_python(self, error: Exception, failure: ControlFlowError) -> bool:
        """Return whether Python may run the function after the tracer failed at no statement: nothing ran before."""
        is_backend = isinstance(error, torch._dynamo.exc.BackendCompilerFailed)
        if not self.trace.may_break or failure.sites or is_backend:
            return False
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][1:]
        return all(
            frame.f_code.co_filename.startswith((OWN_FILES, TORCH_FILES))
            and not frame.f_code.co_name.startswith(RESUMED)
            for frame in frames
        )

    def _pass_over_graph(self) -> None:
        """Refuse to run beside hooks on all modules, or warn that Python runs the function instead of a graph."""
        seen = (
            f"{describe(self.function)}: hooks on all modules are registered (register_module_forward_hook or one like"
            " it), which no graph runs; remove them, or register them on the modules that they are for"
        )
        if self.options.fullgraph:
            raise ControlFlowError(f"{seen}, or let Python run the function then with fullgraph=False")
        warnings.warn(f"no graph runs: {seen}", GraphBreakWarning, stacklevel=3)

    def _trace_for_export(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run inside an export that traces Python as it runs: the tracer's graph stands for the function there."""
        with recording(self.trace), tracing(), setup_compilation_env() as backend:
            return torch.compile(self.counterpart, backend=backend, fullgraph=True)(ENTRY, *args, **kwargs)

    def _compile(self) -> Any:
        backend = functools.partial(compile_graph, options=self.options, reports=self.reports)
        return torch.compile(
            self.counterpart,
            backend=backend,
            fullgraph=self.options.fullgraph,
            dynamic=self.options.dynamic,
        )

    def _break_at(self, error: ControlFlowError) -> None:
        """Let the graph break where it cannot be rewritten, if that is allowed; say so either way."""
        if not self.trace.break_at(error):
            raise error
        warnings.warn(f"one graph becomes two: {error}", GraphBreakWarning, stacklevel=3)

    @contextmanager
    def _reporting_breaks(self) -> Iterator[None]:
        """Warn of the graph breaks of a call."""
        num_known, num_told = len(graph_break_reasons), len(self.trace.breaks)
        try:
            yield
        finally:
            self._note_breaks(num_known)
            for _, reason in self.trace.breaks[num_told:]:
                warnings.warn(f"one graph becomes two: {reason}", GraphBreakWarning, stacklevel=4)

    def _note_breaks(self, num_known: int) -> None:
        """Write down the breaks that the tracer made by itself, for other reasons than control flow."""
        for found in graph_break_reasons[num_known:]:
            frame = last_own_frame(found.user_stack)
            if not found.graph_break or frame is None or found.user_stack[-1].filename.startswith(OWN_FILES):
                continue
            site = Site(frame.filename, frame.lineno or 0, "a graph break", frame.name)
            reason = f"{site.place}: {found.reason.partition(chr(10))[0]} (in {site.function}: `{site.text}`)"
            self.trace.breaks.append((site, reason))

    # ---- explaining

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Explain the function on these arguments: graphs, breaks, rewritten control flow, fusions, memory.

        Nothing of it runs but what lies between two graphs; the arguments are as for a call.
        """
        if self.owner is not None:
            args = (self.owner, *args)
        if has_global_hooks():
            self._pass_over_graph()
        captured = Captured()
        trace = Trace(breaks=self.trace.breaks, may_break=self.trace.may_break)
        with recording(trace), tracing(), self._reporting_breaks():
            self._capture(captured, trace, args, kwargs)
        return explain_captured(self.function, captured, trace, self.trace, self.options)

    def _capture(self, captured: Captured, trace: Trace, args: Any, kwargs: Any) -> None:
        for _ in range(MAX_BREAKS):
            captured.graphs.clear()
            trace.rewritten.clear()
            try:
                capture_inputs(self.counterpart, captured, (ENTRY, *args), kwargs, self.options)
            except ControlFlowError as error:
                self._break_at(error)
            except Exception as error:  # noqa: BLE001 - raised again, in our words where they help
                self._break_at(_explain_failure(error, self.function))
            else:
                return


def has_global_hooks() -> bool:
    """Return whether hooks are registered that run for every module, those of captured graphs among them."""
    return bool(
        hooks._global_forward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_backward_pre_hooks
        or hooks._global_backward_hooks
    )


@contextmanager
def tracing() -> Iterator[None]:
    """The tracer as these functions need it.

    Each tensor condition inside another takes it some eighty Python frames. A Python number stays a Python value, which
    it was compiled for: a branch of a graph takes no variable one. Hooks that are added later are noticed.
    """
    frames = sys.getrecursionlimit()
    sys.setrecursionlimit(max(frames, MAX_FRAMES))
    before = dynamo.recompile_limit, dynamo.specialize_float, dynamo.skip_nnmodule_hook_guards
    _set_tracer(max(dynamo.recompile_limit, MAX_KINDS), specialize_float=True, skip_hook_guards=False)
    try:
        yield
    finally:
        sys.setrecursionlimit(frames)
        _set_tracer(before[0], specialize_float=before[1], skip_hook_guards=before[2])


def _set_tracer(recompile_limit: int, *, specialize_float: bool, skip_hook_guards: bool) -> None:
    dynamo.recompile_limit = recompile_limit
    dynamo.specialize_float = specialize_float
    dynamo.skip_nnmodule_hook_guards = skip_hook_guards


def _restore(module: str, name: str, options: JitOptions, owner: Any) -> Any:
    """A pickled jitted function, found again by its name."""
    found: Any = __import__(module, fromlist=["_"])
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    jitted = found if isinstance(found, Jitted) else Jitted(found, options)
    return jitted if owner is None else jitted.__get__(owner)


def _explain_failure(error: Exception, function: Any) -> ControlFlowError:
    """A tracer's failure in our words where it is about control flow; anything else is raised as it is."""
    refusal = find_refusal(error)
    if refusal is not None:
        raised = ControlFlowError(str(refusal).partition("\n")[0], refusal.sites, refusal.place)
        raised.__cause__ = error
        return raised
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        raise ConfigError(
            f"{describe(function)} is compiled for {MAX_KINDS} kinds of arguments already, and these are another"
            f"{_last_difference()}; give it numbers that change often as tensors, or call it without jit"
        ) from error
    unmet = FAILED_CHECK.search(str(error)) if isinstance(error, RuntimeError) else None
    if unmet is not None:
        raise IndexError(
            f"{describe(function)}: an index is out of bounds: a size that depends on a tensor's values is less than"
            f" {unmet['size']}"
        ) from error
    if not isinstance(error, TRACING_FAILURES):
        raise error
    place = _user_place(error)
    reason = explain_reason(error)
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        told = getattr(error, "inner_exception", error.__cause__)
        if isinstance(told, DeepSeekError):  # a backend said what it cannot do
            raise told
    raised = ControlFlowError(
        f"{place or describe(function)}: this cannot become a part of one graph: {reason};"
        " change it, move it out of the function, or allow a graph break with fullgraph=False"
    )
    raised.__cause__ = error
    return raised


def _last_difference() -> str:
    """Return the check of what was compiled last that the arguments do not pass, in the tracer's words."""
    metrics = torch._dynamo.utils.get_compilation_metrics()
    reason = next((metric.recompile_reason for metric in reversed(metrics) if metric.recompile_reason), None)
    if reason is None:
        return ""
    check = reason.splitlines()[0].partition(": ")[2].partition("  #")[0].strip()
    return f" ({check} does not hold)"


def _user_place(error: Exception) -> str | None:
    """Return the last line of the user's own code in a tracer's report."""
    frame = last_own_frame(getattr(error, "real_stack", None) or [])
    return None if frame is None else f"{frame.filename}:{frame.lineno}"


__all__ = ["ControlFlowError", "GraphBreakWarning", "Jitted", "jit"]
