"""A function's rewritten counterpart: made once, kept on the function, found again by the operators.

`make_counterpart` is what a trace calls for every function of the user's that it comes across, so the operators are
made with it; `rewrite` is for those who want the rewritten function itself. A counterpart takes the operators as its
first parameter, and shares its original's globals, cells and defaults.
"""

from __future__ import annotations

import ast
import builtins
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

from deepseek.compiler.jit.rewriting.context import Context
from deepseek.compiler.jit.rewriting.parsing import compile_function, describe, read
from deepseek.compiler.jit.rewriting.statements import transform
from deepseek.compiler.jit.rewriting.writes import is_special
from deepseek.compiler.jit.shared_names import SITES_NAME
from deepseek.compiler.jit.tracing.calls import Counterpart
from deepseek.compiler.jit.tracing.operators import make_operators
from deepseek.compiler.jit.tracing.sites import runs_while_tracing
from deepseek.core.errors import ConfigError


@runs_while_tracing
def make_counterpart(function: types.FunctionType) -> bool:
    """Make the rewritten counterpart of `function` and keep it there; says whether it has one."""
    if not isinstance(function, types.FunctionType) or _is_standard(function):
        return False
    try:
        keep_counterpart(function)
    except ConfigError:
        return False
    return True


def _is_standard(function: types.FunctionType) -> bool:
    name = (function.__module__ or "").partition(".")[0]
    return name in sys.stdlib_module_names and name != "__main__"


def build(function: types.FunctionType) -> types.FunctionType:
    """Build the counterpart of `function`; raises `ConfigError` where its source cannot be read or rewritten."""
    source = read(function)
    if is_special(source.tree):
        raise ConfigError(f"{describe(function)} is a generator, and a graph has no place to pause; return a list")
    context = Context(source.file, functools.partial(_resolve, function), source.class_name)
    tree = transform(source.tree, context, function.__qualname__)
    tree.decorator_list = []
    tree.returns = None
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    tree.args.kw_defaults = [None if default is None else ast.Constant(None) for default in tree.args.kw_defaults]
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    first = ast.arg(arg="_ds0")
    (tree.args.posonlyargs if tree.args.posonlyargs else tree.args.args).insert(0, first)
    ast.fix_missing_locations(tree)
    return compile_function(tree, function, source, {SITES_NAME: tuple(context.sites)})


def show(function: types.FunctionType) -> str:
    """Give the rewritten source of `function`, to read."""
    source = read(function)
    context = Context(source.file, functools.partial(_resolve, function))
    return ast.unparse(transform(source.tree, context, function.__qualname__))


def _resolve(function: types.FunctionType, name: str) -> Any:
    """Return the present value of a free name in `function`; none where it is not set."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in cells:
        try:
            return cells[name].cell_contents
        except ValueError:
            return None
    if name in function.__globals__:
        return function.__globals__[name]
    return getattr(builtins, name, None)


def keep_counterpart(function: types.FunctionType) -> types.FunctionType:
    """Make the counterpart of `function` and keep it there; raises `ConfigError` where there can be none."""
    counterpart = build(function)
    function.__ds__ = Counterpart(function, counterpart)  # type: ignore[attr-defined]
    return counterpart


ENTRY = make_operators(make_counterpart)
"""The operators that a compiled function's counterpart is called with."""


def rewrite(function: types.FunctionType) -> Callable[..., Any]:
    """Give `function` with its control flow rewritten: plain Python as it runs, one graph when it is traced.

    >>> import torch
    >>> def halve(x):
    ...     while x > 1:
    ...         x = x / 2
    ...     return x
    >>> rewrite(halve)(torch.tensor(12.0))
    tensor(0.7500)
    """
    counterpart = keep_counterpart(function)

    @functools.wraps(function, updated=())
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        return counterpart(ENTRY, *args, **kwargs)

    return rewritten
