"""From a function object to its syntax tree, with lines and columns of the user's file, and from a tree back to code.

The source is found through the code object and not through `__wrapped__`, so that a decorated function is the wrapper
that runs. A method is compiled inside a class of the same name, so that private names are mangled as they were; the
free variables are parameters of an enclosing function, so that the new code has the cells of the old one, alive and
shared.
"""

from __future__ import annotations

import ast
import inspect
import types
from dataclasses import dataclass
from typing import Any

from deepseek.compiler.rewriting.trees import arguments_of, class_of, function_of
from deepseek.core.errors import ConfigError

FACTORY = "_ds_factory"
FUNCTION = "_ds_function"


@dataclass(frozen=True)
class Source:
    """A function's definition: the tree (a `FunctionDef`, or a `Lambda`), its file, and the class it was written in."""

    tree: ast.FunctionDef
    file: str
    class_name: str | None


def read(function: types.FunctionType) -> Source:
    """The definition of `function`; raises `ConfigError` where there is no source to read."""
    code = function.__code__
    file = inspect.getsourcefile(code) or code.co_filename
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {describe(function)} cannot be found, and jit rewrites source; define it in a file"
            " (not in exec or at the prompt)"
        ) from error
    return Source(_parse(lines, max(first, 1), code, file), file, _class_of(function))


def _parse(lines: list[str], first: int, code: types.CodeType, file: str) -> ast.FunctionDef:
    text = "".join(lines)
    is_indented = lines[0][:1].isspace()
    tree = ast.parse("if 1:\n" + text if is_indented else text)
    ast.increment_lineno(tree, first - 1 - is_indented)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            return node
    raise ConfigError(
        f"the source of {code.co_name} at {file}:{first} is not that of a function; was the file changed since?"
    )


def _class_of(function: types.FunctionType) -> str | None:
    parts = function.__qualname__.split(".")
    is_method = len(parts) > 1 and parts[-2] != "<locals>"
    return parts[-2] if is_method else None


def describe(function: Any) -> str:
    """A function's name and place for messages."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def compile_function(
    tree: ast.FunctionDef, original: types.FunctionType, source: Source, extra: dict[str, Any]
) -> types.FunctionType:
    """The function that `tree` describes, with the globals, cells, defaults and name of `original`.

    `extra` are values that the new code finds under names of its own.
    """
    free = original.__code__.co_freevars
    name, tree.name = tree.name, FUNCTION  # under its own name a recursive function would find the factory's
    code = _find_code(_compile_module(tree, (*free, *extra), source), FUNCTION)
    code = code.replace(co_name=name, co_qualname=original.__qualname__)
    cells = dict(zip(free, original.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in extra.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    function = types.FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    function.__kwdefaults__ = original.__kwdefaults__
    function.__qualname__ = original.__qualname__
    function.__module__ = original.__module__
    function.__doc__ = original.__doc__
    return function


def _compile_module(tree: ast.FunctionDef, free: tuple[str, ...], source: Source) -> types.CodeType:
    body: list[ast.stmt] = [tree]
    if source.class_name is not None:
        body = [class_of(source.class_name, body)]
    factory = function_of(FACTORY, arguments_of(free), body)
    module = ast.Module(body=[ast.copy_location(factory, tree)], type_ignores=[])
    return compile(ast.fix_missing_locations(module), source.file, "exec")


def _find_code(code: types.CodeType, name: str) -> types.CodeType:
    """The code of the function `name` inside the factory (and its class, if any)."""
    inner = next(each for each in code.co_consts if isinstance(each, types.CodeType))
    while True:
        codes = {each.co_name: each for each in inner.co_consts if isinstance(each, types.CodeType)}
        if name in codes:
            return codes[name]
        inner = next(iter(codes.values()))
