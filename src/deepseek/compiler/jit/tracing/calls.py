"""What is called instead of the user's functions: their rewritten twins, made when a trace comes across them."""

from __future__ import annotations

from typing import Any

from torch import nn

from deepseek.compiler.jit.tracing.sites import runs_while_tracing

LIBRARIES = ("torch", "numpy", "torchvision", "math", "builtins", "functools")


class Rewritable:
    """What stands for a Python function, such as what `jit` returns; `owner` is its first argument, if any."""

    function: Any
    owner: Any


class Rewritten:
    """A function's rewritten twin, kept on the function itself; its first parameter is the operators."""

    def __init__(self, original: Any, function: Any) -> None:
        self.original = original
        self.function = function


def find_forward(module: nn.Module) -> Any:
    """The function that a call of `module` runs."""
    forward = type(module).forward
    return forward.function if isinstance(forward, Rewritable) else forward


def is_library(name: str | None) -> bool:
    """Whether a module of this name is a library's and stays as it is: torch's own code needs no rewriting."""
    if name is None:
        return True
    return name.partition(".")[0] in LIBRARIES or (name.startswith("deepseek.compiler"))


def find_twin(function: Any, *, is_asked: bool = False) -> Any:
    """The rewritten twin of `function`, made the first time; none for a library's function, unless it is asked for."""
    if not is_asked and is_library(function.__module__):
        return None
    if hasattr(function, "__ds__"):
        known = function.__ds__
        if known is True:
            return None
        if known.original is function:
            return known.function
    if not request(function):
        return None
    return function.__ds__.function


@runs_while_tracing
def request(function: Any) -> bool:
    """Make the twin of `function` and keep it on the function; runs as ordinary Python while tracing."""
    from deepseek.compiler.jit.rewriting.counterparts import make_twin

    return make_twin(function)


def call_with_hooks(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
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
