"""`@dynamic_graph`: one compiled model for all lengths, instead of one for each.

    encoder = ds.dynamic_graph(Encoder(config), mask="mask")     # an nn.Module, changed in place
    hidden = encoder(tokens, mask)                               # tokens (B, T), mask (B, T) of zeros and ones

    @ds.dynamic_graph                                            # or a function, or a class of modules
    def score(x): ...

What happens, in this order. The first call runs eagerly, and shows which dims vary. Repeated blocks are then compiled
once for all their members (`regions.py`), anything else as a whole, with the varying dims as symbols; what an earlier
process compiled is taken from disk (`compiled_cache.py`). With `mask=`, the rows of a batch are sorted by length and
run in groups that are cut to their own longest row (`padding.py`), where the grouping minimises a cost that is measured
as the calls come in (`buckets.py`). With `mask=` or `pad_value=`, lengths may also be padded to a few boundaries, each
compiled for exactly that length; `strategy="auto"` does this where a trial shows that it pays for its compilations.

Why groups: of a batch of 16 sentences, log-normal in length, two thirds is padding. Measured on a Zen 4 core with a
4-layer encoder 128 wide, inference, per batch: 299 ms padded to 512, 50 ms with `torch.compile(dynamic=True)` at the
batch's own length, 24 ms in groups. Symbols in place of numbers cost little there; the padding is what costs.

Padding and splitting are right only for functions that do not look at what was added. They happen only where a mask or
a pad value says that they are meant, and the first batches are compared with the plain function before an answer is
given. Where numbers differ, batches stay as they are, with a warning that says why.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, overload

from torch import nn

from deepseek.compiler.dynamic_shapes.capture import find_backend
from deepseek.compiler.dynamic_shapes.execution import DynamicGraph
from deepseek.compiler.dynamic_shapes.options import DynamicExplanation, DynamicOptions
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

__all__ = ["DynamicExplanation", "DynamicGraph", "DynamicOptions", "dynamic_graph"]

T = TypeVar("T")


@overload
def dynamic_graph(target: T, /) -> T: ...
@overload
def dynamic_graph(target: T, /, **options: Any) -> T: ...
@overload
def dynamic_graph(**options: Any) -> Callable[[T], T]: ...
def dynamic_graph(target: Any = None, /, **options: Any) -> Any:
    """Compile a function, an `nn.Module`, or a class of modules for changing shapes; options as below.

    A module is changed in place and returned: its parameters keep their names, and `module.explain()` tells what
    happened; so does `function.explain()`. Training, evaluation, dropout and autocast work as before.

    - `mask`: the argument (rows, length) of zeros and ones that says which positions count. Giving it promises that
      rows do not depend on each other, and that outputs where the mask is zero are not used: they are zeros then.
      Batches are run in groups of similar length.
    - `dims`: length dims by argument, `{"x": 1}`, where shapes alone do not tell them.
    - `pad_value`: permits padding to boundaries, with this number (or these, by argument).
    - `strategy`: `auto`, `symbolic` or `bucketed`; `boundaries`: lengths to compile for, instead of learned ones.
    - `max_compilations`: never more graphs than this (8); beyond it what does not fit runs eagerly, with a warning that
      names the guard.
    - `min_length`, `max_length`: the range of the lengths, if it is known.
    - `num_checks`: batches of each kind that are compared with the plain function (2); `tolerance`: how far they may
      differ, relative to the largest number.
    - `cost`: a `buckets.Cost` instead of a measured one; grouping is then the same in every run.
    - `backend`: of torch.compile; `cache`: whether compiled code is kept on disk for the next process.

    Raises `ConfigError` for options that are unknown or contradict each other, and for what cannot be compiled.

    >>> import torch
    >>> @dynamic_graph(backend="eager", cache=False)
    ... def double(x):
    ...     return 2 * x
    >>> [double(torch.ones(length)).sum().item() for length in (3, 5, 7)]
    [6.0, 10.0, 14.0]
    >>> len(double.explain().compilations)
    1
    """
    known = {setting.name for setting in fields(DynamicOptions)}
    for name in options:
        if name not in known:
            raise ConfigError(explain_unknown("option of dynamic_graph", name, known))
    chosen = DynamicOptions(**options)
    if target is None:
        return lambda given: _decorate(given, chosen)
    return _decorate(target, chosen)


def _decorate(target: Any, options: DynamicOptions) -> Any:
    find_backend(options.backend)
    if isinstance(target, nn.Module):
        return _decorate_module(inspect.unwrap(target), options)  # of a loaded model, the module that it is a face of
    if isinstance(target, type):
        return _decorate_class(target, options)
    if not callable(target):
        raise ConfigError(f"dynamic_graph was given a {type(target).__name__}; give a function or an nn.Module")
    if inspect.iscoroutinefunction(target) or inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise ConfigError(
            f"{target.__qualname__} is a generator or coroutine; dynamic_graph takes functions that return"
        )
    if not hasattr(target, "__code__") and not isinstance(target, types.MethodType):
        raise ConfigError(f"{target!r} has no Python code to compile; wrap it in a function with def")
    _check_names(target, options)
    return DynamicGraph(target, options)


def _decorate_module(module: nn.Module, options: DynamicOptions) -> nn.Module:
    if isinstance(module.__dict__.get("forward"), DynamicGraph):
        raise ConfigError(f"this {type(module).__name__} is a dynamic graph already; make it one once")
    _check_names(module.forward, options)
    graph = DynamicGraph(module.forward, options, owner=module)
    module.forward = graph
    if not hasattr(module, "explain"):
        module.__dict__["explain"] = graph.explain
    return module


def _decorate_class(kind: type, options: DynamicOptions) -> type:
    if not issubclass(kind, nn.Module):
        raise ConfigError(f"class {kind.__name__} is no nn.Module; dynamic_graph takes functions and modules")
    _check_names(kind.forward, options)
    initialize = kind.__init__

    @functools.wraps(initialize)
    def initialize_dynamic(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        if not isinstance(self.__dict__.get("forward"), DynamicGraph):
            _decorate_module(self, options)

    kind.__init__ = initialize_dynamic  # type: ignore[method-assign]
    return kind


def _check_names(function: Callable[..., Any], options: DynamicOptions) -> None:
    """Every argument that the options name exists."""
    parameters = inspect.signature(function).parameters
    is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    named = [options.mask] if options.mask else []
    named += [*(options.dims or ())]
    named += [*options.pad_value] if isinstance(options.pad_value, Mapping) else []
    for name in named:
        if not is_open and name.partition("[")[0] not in parameters:
            raise ConfigError(explain_unknown("argument", name, parameters))
