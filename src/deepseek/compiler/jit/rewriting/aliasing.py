"""What a function's text tells before it runs: which variables alone hold their tensor, and which are numbers.

Writing into a tensor that one variable alone holds (`out = torch.zeros(5)`, then `out[i] = v`) can be done on a copy
in a branch, and nobody can tell. A variable that plain Python binds to numbers only may be a tensor in a graph, and
is then still calculated with as a number.
"""

from __future__ import annotations

import ast
import copy
from typing import Any

from deepseek.compiler.jit.rewriting.trees import assign, at, load
from deepseek.compiler.jit.rewriting.variables import NONE, SCOPES, Names, captured, walk_scope, writes
from deepseek.compiler.jit.tracing.merging import INTERNAL

SET = f"{INTERNAL}set"
APPEND = f"{INTERNAL}append"
MAKERS = frozenset(
    [
        "zeros",
        "ones",
        "empty",
        "full",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "clone",
        "rand",
        "randn",
        "arange",
        "tensor",
        "eye",
        "linspace",
    ]
)


def find_numbers(statements: list[ast.stmt], outside: Names) -> Names:
    """Variables that plain Python binds to numbers only: counters, and what is calculated from them."""
    bindings: dict[str, list[ast.expr | None]] = {}
    for node in walk_scope(statements):
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            is_range = isinstance(node.iter, ast.Call) and getattr(node.iter.func, "id", "") == "range"
            bindings.setdefault(node.target.id, []).append(ast.Constant(0) if is_range else None)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            bindings.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            bindings.setdefault(node.target.id, []).append(node.value)
        elif isinstance(node, (ast.Assign, ast.For, ast.AnnAssign, ast.With, ast.NamedExpr, ast.comprehension)):
            parts = ast.Tuple([each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)], ast.Load())
            bindings |= {name: [None] for name in writes(parts)}
    found = frozenset(bindings) - outside
    while True:
        again = frozenset(
            name for name in found if all(each is not None and _is_number(each, found) for each in bindings[name])
        )
        if again == found:
            return found
        found = again


def _is_number(node: ast.expr, numbers: Names) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name(id=name):
            return name in numbers
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _is_number(operand, numbers)
        case ast.BinOp(left=left, right=right):
            return _is_number(left, numbers) and _is_number(right, numbers)
        case _:
            return False


def is_real_number(node: ast.expr, numbers: Names) -> bool:
    """Whether an expression is arithmetic on numbers that gives a float."""
    if not _is_number(node, numbers):
        return False
    return any(
        isinstance(each, ast.Div) or (isinstance(each, ast.Constant) and isinstance(each.value, float))
        for each in ast.walk(node)
    )


def parameters_of(tree: ast.FunctionDef) -> tuple[str, ...]:
    """The names of a function's parameters, the starred ones last."""
    arguments = tree.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return tuple(each.arg for each in every if each is not None)


def name_writes(tree: ast.FunctionDef) -> list[ast.stmt]:
    """The function's statements with every write into a fresh tensor as an assignment to its variable.

    `out[i] = v` becomes `out = _ds_set(out, i, v)`, so that all analyses see that `out` changes.
    """
    fresh = find_fresh(tree.body, frozenset(parameters_of(tree))) - captured(tree.body)
    return [_NameWrites(fresh).visit(statement) for statement in tree.body]


class _NameWrites(ast.NodeTransformer):
    def __init__(self, fresh: Names) -> None:
        self.fresh = fresh

    def visit(self, node: ast.AST) -> Any:
        """A nested function is left alone."""
        return node if isinstance(node, SCOPES) else super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        match node.value:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value], keywords=[]):
                if name in self.fresh and not isinstance(value, ast.Starred):
                    call = ast.Call(load(APPEND), [load(name), value], [])
                    return assign(name, call, node)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        if len(node.targets) > 1 or not self._is_fresh_part(target):
            return node
        return self._write(target, node.value, node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not self._is_fresh_part(node.target):
            return node
        now: Any = copy.deepcopy(node.target)
        now.ctx = ast.Load()
        return self._write(node.target, at(ast.BinOp(now, node.op, node.value), node), node)

    def _is_fresh_part(self, target: ast.expr) -> bool:
        is_part = isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)
        return is_part and root_of(target) in self.fresh

    def _write(self, target: Any, value: ast.expr, node: ast.stmt) -> ast.AST:
        name = target.value.id
        call = ast.Call(load(SET), [load(name), target.slice, value], [])
        return assign(name, call, node)


def is_special(node: ast.FunctionDef) -> bool:
    """Whether it is a generator, which stays as it is."""
    return any(isinstance(each, (ast.Yield, ast.YieldFrom, ast.Await)) for each in walk_scope(node.body))


def find_fresh(statements: list[ast.stmt], parameters: Names) -> Names:
    """Variables that only ever hold tensors made for them, so that writing into one is seen nowhere else."""
    made: set[str] = set()
    other: set[str] = set(parameters)
    for node in walk_scope(statements):
        if isinstance(node, ast.Assign) and getattr(getattr(node.value, "func", None), "id", "") in (SET, APPEND):
            continue
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            (made if _is_making(node.value) else other).add(node.targets[0].id)
        elif isinstance(node, ast.AugAssign):
            continue
        elif isinstance(node, ast.Assign):
            other |= frozenset(name for target in node.targets for name in _plain_names(target))
        elif isinstance(node, (ast.For, ast.AnnAssign)):
            other |= writes(node.target)
    return frozenset(made - other - _aliased(statements, made - _lists(statements)))


def _lists(statements: list[ast.stmt]) -> Names:
    """Variables that are given a list somewhere."""
    return frozenset(
        name
        for node in walk_scope(statements)
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.List, ast.ListComp))
        for target in node.targets
        for name in writes(target)
    )


def _plain_names(target: ast.expr) -> Names:
    return NONE if isinstance(target, ast.Subscript) else writes(target)


def _is_making(value: ast.expr) -> bool:
    match value:
        case ast.Call(func=ast.Attribute(attr=name)):
            return name in MAKERS
        case ast.BinOp() | ast.Constant() | ast.Compare() | ast.UnaryOp() | ast.List() | ast.ListComp():
            return True
        case _:
            return False


def _aliased(statements: list[ast.stmt], tensors: set[str]) -> Names:
    """Names that stand alone (or indexed, which may be a view) where their value gets a second holder."""
    found: set[str] = set()
    returned = {id(each) for node in walk_scope(statements) if isinstance(node, ast.Return) for each in ast.walk(node)}
    for node in (each for each in walk_scope(statements) if id(each) not in returned):
        values: list[ast.expr] = []
        if isinstance(node, ast.Assign) and all(_is_part_of(target, tensors) for target in node.targets):
            continue  # what is written into a tensor is copied
        if isinstance(node, (ast.Assign, ast.NamedExpr)) and node.value is not None:
            values = [node.value]
        elif isinstance(node, (ast.List, ast.Tuple, ast.Dict, ast.Set)):
            values = [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
            values = [each for each in values if not (isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))]
        for value in values:
            if isinstance(value, (ast.Name, ast.Subscript)) and not isinstance(getattr(value, "ctx", None), ast.Store):
                found.add(root_of(value))
    return frozenset(found)


def _is_part_of(target: ast.expr, tensors: set[str]) -> bool:
    return isinstance(target, ast.Subscript) and root_of(target) in tensors


def is_plain_counter(node: ast.For) -> bool:
    """Whether the loop's variable is only calculated with, so that it may as well be a tensor."""
    if not isinstance(node.target, ast.Name):
        return False
    name = node.target.id
    plain = sum(
        1
        for each in ast.walk(ast.Module(node.body, []))
        if isinstance(each, (ast.BinOp, ast.Compare))
        for child in ast.iter_child_nodes(each)
        if isinstance(child, ast.Name) and child.id == name
    )
    every = sum(1 for each in ast.walk(ast.Module(node.body, [])) if isinstance(each, ast.Name) and each.id == name)
    return plain == every


def root_of(node: ast.AST) -> str:
    """The name at the left end of `a.b[c].d`, or nothing."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
