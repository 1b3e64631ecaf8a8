"""Writes into what a variable holds become assignments of the variable, so that all analyses see that it changes.

    out[i] = v        =>  out = _ds_set(out, (i,), v)
    out[i] += v       =>  out = _ds_augment_item(out, (i,), "Add", v)
    found.append(v)   =>  found = _ds_change(found, (), "append", v)

Outside of tensor conditions the operators do what was written; inside they work on a copy if nobody else would see the
change, which is found out while tracing. What stands otherwise (in an expression, on an attribute) is left as it is,
and refused by the tracer where a branch would change what is outside of it.
"""

from __future__ import annotations

import ast
from typing import Any

from deepseek.compiler.jit.rewriting.trees import assign, load
from deepseek.compiler.jit.rewriting.variables import SCOPES, Names, captured, declared, walk_scope, writes
from deepseek.compiler.jit.shared_names import BINARY, CHANGING_METHODS, INTERNAL

SET = f"{INTERNAL}set"
CHANGE = f"{INTERNAL}change"
AUGMENT_ITEM = f"{INTERNAL}augment_item"


def parameters_of(tree: ast.FunctionDef) -> tuple[str, ...]:
    """Return the names of a function's parameters, the starred ones last."""
    arguments = tree.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return tuple(argument.arg for argument in every if argument is not None)


def name_writes(tree: ast.FunctionDef) -> list[ast.stmt]:
    """Return the function's statements with every write into a local variable's value as an assignment to the
    variable."""
    elsewhere = declared(tree.body, ast.Global) | declared(tree.body, ast.Nonlocal) | captured(tree.body)
    names = (writes(tree.body) | frozenset(parameters_of(tree))) - elsewhere
    return [_NameWrites(names).visit(statement) for statement in tree.body]


class _NameWrites(ast.NodeTransformer):
    def __init__(self, names: Names) -> None:
        self.names = names

    def visit(self, node: ast.AST) -> Any:
        """A nested function is left alone."""
        return node if isinstance(node, SCOPES) else super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        match node.value:
            case ast.Call(func=ast.Attribute(value=holder, attr=method), args=args, keywords=keywords):
                is_in_place = method.endswith("_") and not method.endswith("__")
                name, path = _path_of(holder)
                if name in self.names and (is_in_place or method in CHANGING_METHODS):
                    call = ast.Call(load(CHANGE), [load(name), path, ast.Constant(method), *args], keywords)
                    return assign(name, call, node)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        if len(node.targets) > 1 or not isinstance(target, ast.Subscript):
            return node
        name, path = _path_of(target)
        if name not in self.names:
            return node
        return assign(name, ast.Call(load(SET), [load(name), path, node.value], []), node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        operation = type(node.op).__name__
        name, path = _path_of(node.target)
        if not isinstance(node.target, ast.Subscript) or name not in self.names or operation not in BINARY:
            return node
        arguments = [load(name), path, ast.Constant(operation), node.value]
        return assign(name, ast.Call(load(AUGMENT_ITEM), arguments, []), node)


def _path_of(node: ast.expr) -> tuple[str, ast.Tuple]:
    """Return the name and the indices of `name[i][j]`; of anything else, no name."""
    indices: list[ast.expr] = []
    while isinstance(node, ast.Subscript):
        indices.insert(0, node.slice)
        node = node.value
    is_starred = any(isinstance(inner, ast.Starred) for index in indices for inner in ast.walk(index))
    name = node.id if isinstance(node, ast.Name) and not is_starred else ""
    return name, ast.Tuple(indices, ast.Load())


def is_special(node: ast.FunctionDef) -> bool:
    """Return whether it is a generator, which stays as it is."""
    return any(isinstance(inner, (ast.Yield, ast.YieldFrom, ast.Await)) for inner in walk_scope(node.body))


def is_plain_counter(node: ast.For) -> bool:
    """Return whether the loop's variable is only calculated with, so that it may as well be one of the graph."""
    if not isinstance(node.target, ast.Name):
        return False
    name = node.target.id
    body = list(ast.walk(ast.Module(node.body, [])))
    num_operands = sum(
        isinstance(child, ast.Name) and child.id == name
        for inner in body
        if isinstance(inner, (ast.BinOp, ast.Compare))
        for child in ast.iter_child_nodes(inner)
    )
    return num_operands == sum(isinstance(inner, ast.Name) and inner.id == name for inner in body)
