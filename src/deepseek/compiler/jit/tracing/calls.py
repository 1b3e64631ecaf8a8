"""What is called instead of the user's functions: their rewritten counterparts, made when a trace reaches them.

The operators are given the maker of counterparts; how a function is rewritten is not known here.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compiler.jit.tracing.conditions import ConditionOperators
from deepseek.compiler.jit.tracing.merging import publish

LIBRARIES = ("torch", "numpy", "torchvision", "math", "builtins", "functools")
PYTHON_CLASSES = (list, dict, tuple, set, str, collections.OrderedDict, collections.deque)
Maker = Callable[[types.FunctionType], bool]
"""Makes the counterpart of a function, keeps it on the function, and says whether there is one; runs while tracing."""


class Rewritable:
    """An object that wraps a Python function, such as a jitted one; `owner` is its first argument, if any."""

    function: types.FunctionType
    owner: Any


class Counterpart:
    """A function's rewritten counterpart, kept on the function itself; its first parameter is the operators."""

    def __init__(self, original: types.FunctionType, function: types.FunctionType) -> None:
        self.original = original
        self.function = function


class Calls(ConditionOperators):
    """Calls of functions, methods and modules."""

    make_counterpart: Maker
    is_entry = False  # of the function that the user called: its result leaves the graph
    inner: Calls  # the operators of the functions that it calls

    def give(self, value: Any) -> Any:
        """Return the result of a function."""
        return publish(value) if self.is_entry else value

    def mark(self, function: Any) -> Any:
        """A function defined inside rewritten code is rewritten already."""
        function.__ds__ = True
        return function

    def method(self, value: Any, name: str) -> Any:
        """The method `name` of a value, rewritten if it is the user's."""
        found = getattr(value, name)
        return found if isinstance(value, Tensor) or type(value) in PYTHON_CLASSES else self.call(found)

    def parent(self, cls: type, value: Any, name: str) -> Any:
        """`super().name` in a method of `cls`."""
        above: Any = super(cls, value)  # type: ignore[misc, unused-ignore]
        is_above = False
        for base in type(value).__mro__:
            function = base.__dict__[name] if is_above and name in base.__dict__ else None
            if function is not None:
                is_function = isinstance(function, types.FunctionType)
                return functools.partial(self.call(function), value) if is_function else getattr(above, name)
            is_above = is_above or base is cls
        return getattr(above, name)

    def call(self, function: Any) -> Any:  # noqa: PLR0911 - a table
        """Return the rewritten counterpart of `function` if it is the user's own code, else `function` itself."""
        if isinstance(function, types.MethodType):
            counterpart = self._find(function.__func__)
            if counterpart is None:
                return function
            return functools.partial(counterpart, self.inner, function.__self__)
        if isinstance(function, types.FunctionType):
            counterpart = self._find(function)
            return function if counterpart is None else functools.partial(counterpart, self.inner)
        if isinstance(function, nn.Module):
            return self._call_module(function)
        if isinstance(function, Rewritable):
            counterpart = functools.partial(self._find(function.function), self.inner)
            return counterpart if function.owner is None else functools.partial(counterpart, function.owner)
        if isinstance(function, functools.partial):
            return functools.partial(self.call(function.func), *function.args, **function.keywords)
        return function

    def _call_module(self, module: nn.Module) -> Any:
        if all(is_library(type(part).__module__) for part in module.modules()):
            return module
        forward = find_forward(module)
        counterpart = find_counterpart(forward, self.make_counterpart)  # a container may hold the user's modules
        if counterpart is None:
            return module
        if torch.is_grad_enabled() and (module._backward_hooks or module._backward_pre_hooks):
            return module  # the tracer refuses them, or breaks the graph here
        run = functools.partial(counterpart, self.inner, module)
        if module._forward_hooks or module._forward_pre_hooks:
            return functools.partial(call_with_hooks, module, run)
        return run

    def _find(self, function: Any) -> Any:
        return None if is_library(function.__module__) else find_counterpart(function, self.make_counterpart)


def find_forward(module: nn.Module) -> Any:
    """Return the function that a call of `module` runs."""
    forward = type(module).forward
    return forward.function if isinstance(forward, Rewritable) else forward


def is_library(name: str | None) -> bool:
    """Return whether a module of this name is a library's and stays as it is: torch's own code needs no rewriting."""
    if name is None:
        return True
    return name.partition(".")[0] in LIBRARIES or name.startswith("deepseek.compiler")


def find_counterpart(function: Any, make_counterpart: Maker) -> Any:
    """Return the rewritten counterpart of `function`, made the first time; none where it cannot be rewritten."""
    if hasattr(function, "__ds__"):
        known = function.__ds__
        if known is True:
            return None
        if known.original is function:
            return known.function
    if not make_counterpart(function):
        return None
    return function.__ds__.function


def call_with_hooks(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward between its hooks, as `nn.Module.__call__` does."""
    with_kwargs = module._forward_pre_hooks_with_kwargs
    for key, hook in module._forward_pre_hooks.items():
        if key in with_kwargs:
            changed = hook(module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    result = forward(*args, **kwargs)
    for key, hook in module._forward_hooks.items():
        extra = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
        changed = hook(module, args, *extra, result)
        result = result if changed is None else changed
    return result
