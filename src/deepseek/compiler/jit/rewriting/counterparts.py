"""A function's rewritten twin: made once, kept on the function, found again by the operators.

`make_twin` is what a trace calls for every function of the user's that it comes across; `rewrite` is for those who want
the rewritten function itself, to trace it with `torch.export` or another tool. A twin takes the operators as its first
parameter, and shares its original's globals, cells and defaults.
"""

from __future__ import annotations

import ast
import builtins
import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek.compiler.jit.rewriting.aliasing import is_special
from deepseek.compiler.jit.rewriting.parsing import compile_function, describe, read
from deepseek.compiler.jit.rewriting.statements import SITES_NAME, Transformer
from deepseek.compiler.jit.tracing.calls import Rewritten
from deepseek.compiler.jit.tracing.operators import BUILDING
from deepseek.compiler.jit.tracing.sites import Site
from deepseek.core.errors import ConfigError

STANDARD_LIBRARY = tuple(
    str(Path(module.__file__).resolve().parent) for module in (ast, functools) if module.__file__ is not None
)


def make_twin(function: Any) -> bool:
    """Make the rewritten twin of `function` and keep it there; says whether it has one."""
    if not isinstance(function, types.FunctionType) or _is_standard(function):
        return False
    try:
        keep_twin(function)
    except ConfigError:
        return False
    return True


def _is_standard(function: types.FunctionType) -> bool:
    name = (function.__module__ or "").partition(".")[0]
    return name in sys.stdlib_module_names and name != "__main__"


def transform(function: types.FunctionType) -> types.FunctionType:
    """The twin of `function`; raises `ConfigError` where its source cannot be read or rewritten."""
    source = read(function)
    if is_special(source.tree):
        raise ConfigError(f"{describe(function)} is a generator, and a graph has no place to pause; return a list")
    resolve = functools.partial(_resolve, function)
    transformer = Transformer(source.file, function.__qualname__, resolve, source.class_name)
    tree = transformer.transform(source.tree)
    tree.decorator_list = []
    tree.returns = None
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    tree.args.kw_defaults = [None if each is None else ast.Constant(None) for each in tree.args.kw_defaults]
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    first = ast.arg(arg="_ds0")
    (tree.args.posonlyargs if tree.args.posonlyargs else tree.args.args).insert(0, first)
    ast.fix_missing_locations(tree)
    return compile_function(tree, function, source, {SITES_NAME: tuple(transformer.sites)})


def show(function: types.FunctionType) -> str:
    """The rewritten source of `function`, to read."""
    source = read(function)
    transformer = Transformer(source.file, function.__qualname__, functools.partial(_resolve, function))
    return ast.unparse(transformer.transform(source.tree))


def _resolve(function: types.FunctionType, name: str) -> Any:
    """What a free name means in `function` now; none where it is not set."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in cells:
        try:
            return cells[name].cell_contents
        except ValueError:
            return None
    if name in function.__globals__:
        return function.__globals__[name]
    return getattr(builtins, name, None)


def keep_twin(function: types.FunctionType) -> types.FunctionType:
    """The twin of `function`, made and kept; raises `ConfigError` where there can be none."""
    twin = transform(function)
    function.__ds__ = Rewritten(function, twin)  # type: ignore[attr-defined]
    return twin


def rewrite(function: types.FunctionType) -> Callable[..., Any]:
    """`function` with its control flow rewritten: plain Python as it runs, one graph when it is traced.

    >>> import torch
    >>> def halve(x):
    ...     while x > 1:
    ...         x = x / 2
    ...     return x
    >>> rewrite(halve)(torch.tensor(12.0))
    tensor(0.7500)
    """
    twin = keep_twin(function)

    @functools.wraps(function, updated=())
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        return twin(BUILDING, *args, **kwargs)

    return rewritten


__all__ = ["Site", "make_twin", "rewrite", "show", "transform"]
