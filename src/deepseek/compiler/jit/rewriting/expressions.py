"""Expressions become calls of the operators: conditions, chains, calls, indices, numbers taken out of tensors."""

from __future__ import annotations

import ast
import types
from typing import TypeVar

import torch

from deepseek.compiler.jit.rewriting.context import Position
from deepseek.compiler.jit.rewriting.lowering import is_python
from deepseek.compiler.jit.rewriting.trees import (
    arguments_of,
    at,
    attribute,
    call,
    constant,
    keyword_of,
    load,
    thunk,
    tuple_of,
)
from deepseek.compiler.jit.rewriting.variables import NONE, Names, reads, writes
from deepseek.compiler.jit.shared_names import COMPARISONS, INTERNAL, UNDEFINED_NAME

LIBRARIES = {"torch", "math", "numpy"}
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp

Expression = TypeVar("Expression", bound=ast.expr)

# What asks for the type of a value, with its numbers of arguments and keywords -> the operator that answers.
TYPE_QUESTIONS = {("isinstance", 2, 0): "is_instance", ("type", 1, 0): "type_of"}


class Expressions(ast.NodeTransformer):
    """Rewrites the expressions of one statement: conditions, calls, numbers taken out of tensors."""

    def __init__(self, position: Position, hidden: Names = NONE) -> None:
        self.position = position
        self.hidden = hidden  # names that a lambda or a comprehension around binds
        self.operators = position.operators

    # ---- conditions

    def condition(self, node: ast.expr) -> ast.expr:
        """Return an expression of which only the truth matters."""
        match node:
            case ast.BoolOp(op=op, values=values) if not has_walrus(node):
                return self._join(isinstance(op, ast.And), values, node)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                site = self.position.site(node, "not")
                return at(call(self.operators, "not_", self.condition(operand), site), node)
            case _:
                found: ast.expr = self.visit(node)
                return found

    def _join(self, is_and: bool, values: list[ast.expr], node: ast.expr) -> ast.expr:
        result = self.condition(values[0])
        for value in values[1:]:
            site = self.position.site(node, "a condition")
            name = "and_" if is_and else "or_"
            result = at(call(self.operators, name, result, thunk(self.condition(value)), site), node)
        return result

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        """`a and b` as a value: one of both."""
        if has_walrus(node):
            return self._generic(node)
        result: ast.expr = self.visit(node.values[0])
        for value in node.values[1:]:
            right, same = self._branch(value), self._branch(None)
            branches = (right, same) if isinstance(node.op, ast.And) else (same, right)
            site = self.position.site(node, "a condition")
            result = at(call(self.operators, "either", result, *branches, site), node)
        return result

    def _branch(self, value: ast.expr | None) -> ast.expr:
        deeper = self.position.deeper()
        names = [deeper.operators, f"{INTERNAL}value"]
        body = load(names[1]) if value is None else Expressions(deeper, self.hidden).visit(value)
        return ast.Lambda(arguments_of(names), body)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        if has_walrus(node):
            return self._generic(node)
        test = self.condition(node.test)
        if is_python(node.test):
            return at(ast.IfExp(test, self.visit(node.body), self.visit(node.orelse)), node)
        deeper = self.position.deeper()
        inner = Expressions(deeper, self.hidden)
        names = sorted(self.position.read_only([node.body, node.orelse], self.hidden))
        branches = [
            ast.Lambda(arguments_of([deeper.operators, *names]), inner.visit(branch))
            for branch in (node.body, node.orelse)
        ]
        site = self.position.site(node, "a conditional expression")
        return at(call(self.operators, "cond", test, *branches, tuple_of(names), site), node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        return self.condition(node) if isinstance(node.op, ast.Not) else self._generic(node)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        match node:
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as op], comparators=[ast.Constant(value=bool())]):
                site = self.position.site(node, "a comparison")
                found = call(self.operators, "is_truth", self.visit(node.left), node.comparators[0])
                return at(call(self.operators, "not_", found, site) if isinstance(op, ast.IsNot) else found, node)
        names = [type(op).__name__ for op in node.ops]
        if names in (["In"], ["NotIn"]) and not has_walrus(node):
            found = call(self.operators, "is_in", self.visit(node.left), self.visit(node.comparators[0]))
            site = self.position.site(node, "a comparison")
            return at(found if names == ["In"] else call(self.operators, "not_", found, site), node)
        is_beside_constant = len(names) == 1 and isinstance(node.comparators[0], ast.Constant)
        if is_beside_constant or any(name not in COMPARISONS for name in names) or has_walrus(node):
            return self._generic(node)
        site = self.position.site(node, "a comparison")
        rights = ast.Tuple([thunk(self.visit(right)) for right in node.comparators], ast.Load())
        made = call(self.operators, "compare", constant(tuple(names)), self.visit(node.left), rights, site)
        return at(made, node)

    # ---- calls, indices, names

    def visit_Call(self, node: ast.Call) -> ast.expr:
        arguments = [self.visit(argument) for argument in node.args]
        keywords = [keyword_of(keyword.arg, self.visit(keyword.value)) for keyword in node.keywords]
        return at(self._call_of(node, arguments, keywords), node)

    def _call_of(self, node: ast.Call, arguments: list[ast.expr], keywords: list[ast.keyword]) -> ast.expr:  # noqa: PLR0911, PLR0912 - a table
        function, operators = node.func, self.operators
        context = self.position.context
        match function:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr=name):
                parent = [load("__class__"), load(self.position.scope.parameters[0]), ast.Constant(name)]
                return ast.Call(at(call(operators, "parent", *parent), function), arguments, keywords)
            case ast.Name(id="super") if not arguments:
                arguments = [load("__class__"), load(self.position.scope.parameters[0])]
                return ast.Call(function, arguments, keywords)
            case ast.Name(id="range") if self._is_builtin("range"):
                return call(operators, "range", *arguments)
            case ast.Name(id="int" | "float" | "bool" as kind) if self._is_builtin(kind) and len(arguments) == 1:
                return call(operators, "to_number", ast.Constant(kind), arguments[0])
            case ast.Name(id="isinstance" | "type" as kind) if (
                self._is_builtin(kind) and (kind, len(arguments), len(keywords)) in TYPE_QUESTIONS
            ):
                return call(operators, TYPE_QUESTIONS[kind, len(arguments), len(keywords)], *arguments)
            case ast.Name(id="slice") if self._is_builtin("slice") and not keywords and not has_star(node):
                bounds = [ast.Constant(None), *arguments] if len(arguments) == 1 else arguments
                bounds += [ast.Constant(None)] * (3 - len(bounds))
                return call(operators, "slice", *bounds, self.position.site(node, "a slice"))
            case ast.Name(id="pow") if self._is_builtin("pow") and len(arguments) == 3 and not keywords:
                return call(operators, "power", *arguments)
            case ast.Name(id="sorted") if self._is_builtin("sorted"):
                return ast.Call(attribute(operators, "sorted"), arguments, keywords)
            case ast.Name(id="min" | "max" as kind) if self._is_builtin(kind) and not keywords:
                return call(operators, "choose", ast.Constant(kind), *arguments)
            case ast.Attribute() if arguments and self._is_torch_tensor(function):
                return ast.Call(attribute(operators, "tensor"), [function, *arguments], keywords)
            case ast.Attribute(value=value, attr="item") if not arguments:
                return call(operators, "item", self.visit(value))
            case ast.Name(id=name) if self._is_builtin(name) or name.startswith(INTERNAL):
                return ast.Call(function, arguments, keywords)
            case ast.Attribute() if self._module_of(function) is not None:
                return ast.Call(function, arguments, keywords)
            case ast.Attribute(value=value, attr=name):
                found = call(operators, "method", self.visit(value), ast.Constant(mangle(name, context.class_name)))
                return ast.Call(at(found, function), arguments, keywords)
            case _:
                found = call(operators, "call", self.visit(function))
                return ast.Call(at(found, function), arguments, keywords)

    def _is_builtin(self, name: str) -> bool:
        is_local = name in self.position.scope.locals | self.hidden
        return not is_local and self.position.context.is_builtin(name)

    def _module_of(self, node: ast.Attribute) -> types.ModuleType | None:
        """Return the library's module that an attribute such as `torch.relu`, `F.relu`, `math.sqrt` is of."""
        root = ast.unparse(node).partition(".")[0] if is_dotted(node) else ""
        if root in self.position.scope.locals | self.hidden:
            return None
        module = self.position.context.resolve(root)
        is_library = isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] in LIBRARIES
        return module if is_library else None

    def _is_torch_tensor(self, node: ast.Attribute) -> bool:
        return node.attr in ("tensor", "as_tensor") and self._module_of(node) is torch

    def index(self, node: ast.expr) -> ast.expr:
        """Return the index in brackets as a value."""
        match node:
            case ast.Slice(lower=low, upper=up, step=step):
                parts = [ast.Constant(None) if bound is None else self.visit(bound) for bound in (low, up, step)]
                if not reads(node):
                    return at(ast.Call(load("slice"), parts, []), node)
                return at(call(self.operators, "slice", *parts, self.position.site(node, "a slice")), node)
            case ast.Tuple(elts=elements) if any(isinstance(element, ast.Slice) for element in elements):
                return at(ast.Tuple([self.index(element) for element in elements], ast.Load()), node)
            case _:
                found: ast.expr = self.visit(node)
                return found

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Slice) and reads(node.slice):
            return at(ast.Subscript(self.visit(node.value), self.index(node.slice), ast.Load()), node)
        is_plain = isinstance(node.ctx, ast.Load) and not isinstance(node.slice, (ast.Constant, ast.Slice))
        if not is_plain or has_star(node.slice) or not reads(node.slice):
            return self._generic(node)
        made = call(self.operators, "get", self.visit(node.value), self.index(node.slice))
        return at(made, node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == UNDEFINED_NAME:
            return at(attribute(self.operators, "undefined"), node)
        if not isinstance(node.ctx, ast.Load) or node.id in self.hidden or node.id.startswith(INTERNAL):
            return node
        scope = self.position.scope
        may_be_missing = node.id in scope.missing and node.id not in self.position.known
        if not may_be_missing and node.id not in scope.deleted:
            return node
        return at(call(self.operators, "check", node, ast.Constant(node.id)), node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        rewrite_defaults(node.args, self)
        inner = self._hiding(frozenset(arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)))
        node.body = inner.visit(node.body)
        return at(call(self.operators, "mark", node), node)

    def _hiding(self, names: Names) -> Expressions:
        """For what stands inside a lambda or a comprehension that binds `names`."""
        return Expressions(self.position.knowing(names), self.hidden | names)

    def visit_ListComp(self, node: ast.ListComp) -> ast.expr:
        return self._comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> ast.expr:
        return self._comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> ast.expr:
        return self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.expr:
        return self._comprehension(node)

    def _comprehension(self, node: Comprehension) -> ast.expr:
        inner = self._hiding(frozenset(name for generator in node.generators for name in writes(generator.target)))
        for generator in node.generators:
            generator.iter = inner.visit(generator.iter)
            generator.ifs = [inner._checked(test) for test in generator.ifs]
        for name in ("elt", "key", "value"):
            if hasattr(node, name):
                setattr(node, name, inner.visit(getattr(node, name)))
        return node

    def _checked(self, test: ast.expr) -> ast.expr:
        site = self.position.site(test, "a comprehension")
        return at(call(self.operators, "test", self.condition(test), site), test)

    def _generic(self, node: Expression) -> Expression:
        self.generic_visit(node)
        return node


def rewrite_defaults(arguments: ast.arguments, rewrite: Expressions) -> None:
    """Rewrite the values that parameters have by default: they are computed where the function is defined."""
    arguments.defaults = [rewrite.visit(default) for default in arguments.defaults]
    arguments.kw_defaults = [None if default is None else rewrite.visit(default) for default in arguments.kw_defaults]


def is_dotted(node: ast.expr) -> bool:
    """Return whether it is a name such as `torch.nn.functional`, in which nothing is computed."""
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and is_dotted(node.value))


def has_walrus(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.NamedExpr) for inner in ast.walk(node))


def has_star(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Starred) for inner in ast.walk(node))


def mangle(name: str, class_name: str | None) -> str:
    is_private = name.startswith("__") and not name.endswith("__")
    return f"_{class_name.lstrip('_')}{name}" if is_private and class_name else name
