"""Small syntax trees, made in one word each."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, TypeVar

Tree = TypeVar("Tree", bound=ast.AST)


def at(node: Tree, where: ast.AST) -> Tree:
    """`node` with the line and column of `where`, and so everything in it that has none."""
    return ast.fix_missing_locations(ast.copy_location(node, where))


def constant(value: str | int | float | bool | tuple[str, ...] | None) -> ast.Constant:
    return ast.Constant(value)  # type: ignore[arg-type]  # the compiler takes tuples of constants


def function_of(name: str, arguments: ast.arguments, body: list[ast.stmt]) -> ast.FunctionDef:
    """Return a definition; Python 3.12 and later want its type parameters named."""
    fields: dict[str, Any] = {"name": name, "args": arguments, "body": body, "decorator_list": []}
    return ast.FunctionDef(**_with_type_parameters(ast.FunctionDef, fields))


def load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def store(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def assign_constant(name: str, value: bool) -> ast.stmt:
    return ast.Assign(targets=[store(name)], value=ast.Constant(value))


def attribute(name: str, field: str) -> ast.Attribute:
    return ast.Attribute(load(name), field, ast.Load())


def call(operators: str, name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(attribute(operators, name), list(arguments), [])


def tuple_of(names: Sequence[str]) -> ast.Tuple:
    return ast.Tuple([load(name) for name in names], ast.Load())


def arguments_of(names: Sequence[str]) -> ast.arguments:
    return ast.arguments(
        posonlyargs=[], args=[ast.arg(arg=name) for name in names], kwonlyargs=[], kw_defaults=[], defaults=[]
    )


def class_of(name: str, body: list[ast.stmt]) -> ast.ClassDef:
    fields: dict[str, Any] = {"name": name, "bases": [], "keywords": [], "body": body, "decorator_list": []}
    return ast.ClassDef(**_with_type_parameters(ast.ClassDef, fields))


def _with_type_parameters(kind: type[ast.AST], fields: dict[str, Any]) -> dict[str, Any]:
    return fields | ({"type_params": []} if "type_params" in kind._fields else {})


def assign(name: str, value: ast.expr, where: ast.AST) -> ast.stmt:
    return at(ast.Assign(targets=[store(name)], value=value), where)


def thunk(body: ast.expr) -> ast.Lambda:
    return ast.Lambda(arguments_of([]), body)


def keyword_of(name: str | None, value: ast.expr) -> ast.keyword:
    """Return an argument by name; without a name, a mapping of them."""
    return ast.keyword(arg=name, value=value)
