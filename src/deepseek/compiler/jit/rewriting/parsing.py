"""From a function object to its syntax tree, with lines and columns of the user's file, and from a tree back to code.

The source is found through the code object and not through `__wrapped__`, so that a decorated function is the wrapper
that runs. A method is compiled inside a class of the same name, so that private names are mangled as they were; the
free variables are parameters of an enclosing function, so that the new code has the cells of the old one, alive and
shared.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import functools
import inspect
import operator
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepseek.compiler.jit.rewriting.trees import arguments_of, class_of, function_of
from deepseek.core.errors import ConfigError

FACTORY = "_ds_factory"
FUNCTION = "_ds_function"
WAYS_OF_CALLING = {"PUSH_NULL", "PRECALL", "NOP", "CACHE", "RESUME", "EXTENDED_ARG", "COPY_FREE_VARS"}
FUTURE_FLAGS = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


@dataclass(frozen=True)
class Source:
    """A function's definition: the tree (a `FunctionDef`, or a `Lambda`), its file, and the class it was written in."""

    tree: ast.FunctionDef
    file: str
    class_name: str | None
    flags: int
    """The file's `__future__` imports, as the flags of `compile`."""


def read(function: types.FunctionType) -> Source:
    """Return the definition of `function`; raises `ConfigError` where there is no source to read."""
    code = function.__code__
    file = inspect.getsourcefile(code) or code.co_filename
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {describe(function)} cannot be found, and jit rewrites source; define it in a file"
            " (not in exec or at the prompt)"
        ) from error
    flags = code.co_flags & FUTURE_FLAGS
    source = Source(_parse(lines, max(first, 1), code, file), file, _class_of(function), flags)
    refuse_changed(source, function)
    return source


def refuse_changed(source: Source, function: types.FunctionType) -> None:
    """Raise `ConfigError` where the source is not that of the function any more, since the file was edited.

    What the source compiles to is compared; a function with `assert` may have been changed by a test runner.
    """
    if any(isinstance(node, ast.Assert) for node in ast.walk(source.tree)):
        return
    tree = copy.deepcopy(source.tree)
    tree.name, tree.decorator_list = FUNCTION, []
    code = _find_code(_compile_module(tree, function.__code__.co_freevars, source), FUNCTION)
    if not is_same_code(code, function.__code__):
        raise ConfigError(
            f"the source of {describe(function)} is not what runs, since the file was changed after it was imported;"
            " start again"
        )


def is_same_code(one: types.CodeType, other: types.CodeType) -> bool:
    """Return whether two pieces of code do the same; how names of modules are called may differ with what a file
    imports."""
    if list(_instructions(one)) != list(_instructions(other)):
        return False
    inner = [[constant for constant in code.co_consts if isinstance(constant, types.CodeType)] for code in (one, other)]
    return len(inner[0]) == len(inner[1]) and all(map(is_same_code, *inner))


def _instructions(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """Give what code does, step by step, without the targets of jumps and the ways of calling."""
    for step in dis.get_instructions(code):
        if step.opname in WAYS_OF_CALLING:
            continue
        if isinstance(step.argval, types.CodeType) or "JUMP" in step.opname or step.opname in ("FOR_ITER", "SEND"):
            yield step.opname, ""
        elif not (step.opname == "LOAD_CONST" and isinstance(step.argval, str)):  # may be an inner function's name
            yield step.opname.replace("LOAD_METHOD", "LOAD_ATTR"), step.argrepr.rpartition(" + ")[2]


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
    """Return a function's name, file and line for messages."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def compile_function(
    tree: ast.FunctionDef, original: types.FunctionType, source: Source, extra: dict[str, Any]
) -> types.FunctionType:
    """Return the function that `tree` describes, with the globals, cells, defaults and name of `original`.

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
    code: types.CodeType = compile(
        ast.fix_missing_locations(module), source.file, "exec", flags=source.flags, dont_inherit=True
    )
    return code


def _find_code(code: types.CodeType, name: str) -> types.CodeType:
    """Return the code of the function `name` inside the factory (and its class, if any)."""
    inner = next(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    while True:
        codes = {constant.co_name: constant for constant in inner.co_consts if isinstance(constant, types.CodeType)}
        if name in codes:
            return codes[name]
        inner = next(iter(codes.values()))
