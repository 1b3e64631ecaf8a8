"""Expressions become calls of the operators: conditions, chains, calls, indices, numbers taken out of tensors."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deepseek.compiler.jit.rewriting.aliasing import is_real_number, root_of
from deepseek.compiler.jit.rewriting.lowering import is_python
from deepseek.compiler.jit.rewriting.trees import arguments_of, at, attribute, call, constant, load, thunk, tuple_of
from deepseek.compiler.jit.rewriting.variables import NONE, Names, reads, writes
from deepseek.compiler.jit.tracing.merging import INTERNAL
from deepseek.compiler.jit.tracing.operators import COMPARISONS

if TYPE_CHECKING:
    from deepseek.compiler.jit.rewriting.statements import Transformer

UNDEFINED_NAME = f"{INTERNAL}undefined"


@dataclass
class Scope:
    """One function of the user's while it is transformed."""

    name: str
    file: str
    parameters: tuple[str, ...]
    names: Names  # local variables that nobody else writes
    outside: dict[str, type[ast.Global] | type[ast.Nonlocal]]  # assigned here, living elsewhere
    shared: Names  # local variables that functions defined here read
    fresh: Names  # variables that hold nothing but tensors made here
    numbers: Names  # variables that are numbers in plain Python, and tensors at most in a graph
    resolve: Callable[[str], Any]
    missing: set[str] = field(default_factory=set)  # variables that may be read before they are written
    num_parts: int = 0


@dataclass(frozen=True)
class Place:
    """Where in a scope a statement stands: the level of operators, and which level made each variable."""

    level: int
    owners: dict[str, int]

    @property
    def operators(self) -> str:
        return f"_ds{self.level}"

    def deeper(self, bound: Names) -> Place:
        return Place(self.level + 1, {**self.owners, **dict.fromkeys(bound, self.level + 1)})

    def owner(self, name: str) -> ast.expr:
        """The operators of the level that made a variable; None for what came from outside of the function."""
        return ast.Name(f"_ds{self.owners[name]}", ast.Load()) if name in self.owners else ast.Constant(None)


class Expressions(ast.NodeTransformer):
    """Rewrites the expressions of one statement: conditions, calls, numbers taken out of tensors."""

    def __init__(self, owner: Transformer, scope: Scope, place: Place, known: Names, hidden: Names = NONE) -> None:
        self.owner = owner
        self.scope = scope
        self.place = place
        self.known = known
        self.hidden = hidden  # names that a lambda or a comprehension around binds
        self.is_real = False  # inside arithmetic on numbers that gives a float

    # ---- conditions

    def visit(self, node: ast.AST) -> Any:
        """The tree that stands for `node`."""
        return super().visit(node)

    def condition(self, node: ast.expr) -> ast.expr:
        """An expression of which only the truth matters."""
        match node:
            case ast.BoolOp(op=op, values=values) if not has_walrus(node):
                return self._join(isinstance(op, ast.And), values, node)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                site = self.owner.make_site(node, "not", self.scope)
                return at(call(self.place.operators, "not_", self.condition(operand), site), node)
            case _:
                found: ast.expr = self.visit(node)
                return found

    def _join(self, is_and: bool, values: list[ast.expr], node: ast.expr) -> ast.expr:
        result = self.condition(values[0])
        for value in values[1:]:
            site = self.owner.make_site(node, "a condition", self.scope)
            name = "and_" if is_and else "or_"
            result = at(call(self.place.operators, name, result, thunk(self.condition(value)), site), node)
        return result

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        """`a and b` as a value: one of both."""
        if has_walrus(node):
            return self._generic(node)
        result: ast.expr = self.visit(node.values[0])
        for value in node.values[1:]:
            right, same = self._branch(value), self._branch(None)
            branches = (right, same) if isinstance(node.op, ast.And) else (same, right)
            result = self._choose(result, branches, node, names=("_ds_value",))
        return result

    def _branch(self, value: ast.expr | None) -> ast.expr:
        deeper = self.place.deeper(NONE)
        names = [deeper.operators, f"{INTERNAL}value"]
        body = (
            load(names[1])
            if value is None
            else Expressions(self.owner, self.scope, deeper, self.known, self.hidden).visit(value)
        )
        return ast.Lambda(arguments_of(names), body)

    def _choose(
        self, test: ast.expr, branches: tuple[ast.expr, ast.expr], node: ast.AST, names: tuple[str, ...]
    ) -> ast.expr:
        """`cond` on a value computed once, which both branches receive."""
        site = self.owner.make_site(node, "a condition", self.scope)
        like = self.owner.like(self.scope, self.known)
        made = call(self.place.operators, "either", test, *branches, site, like)
        return at(made, node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        if has_walrus(node):
            return self._generic(node)
        test = self.condition(node.test)
        if is_python(node.test):
            return at(ast.IfExp(test, self.visit(node.body), self.visit(node.orelse)), node)
        deeper = self.place.deeper(NONE)
        inner = Expressions(self.owner, self.scope, deeper, self.known, self.hidden)
        names = sorted(self.owner.read_only([node.body, node.orelse], self.hidden, self.scope, self.known))
        branches = [
            ast.Lambda(arguments_of([deeper.operators, *names]), inner.visit(each)) for each in (node.body, node.orelse)
        ]
        site = self.owner.make_site(node, "a conditional expression", self.scope)
        made = call(
            self.place.operators,
            "cond",
            test,
            *branches,
            tuple_of(names),
            ast.Constant(None),
            site,
            self.owner.like(self.scope, self.known),
        )
        return at(made, node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        return self.condition(node) if isinstance(node.op, ast.Not) else self._generic(node)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        names = [type(op).__name__ for op in node.ops]
        if len(names) == 1 or any(name not in COMPARISONS for name in names) or has_walrus(node):
            return self._generic(node)
        site = self.owner.make_site(node, "a comparison", self.scope)
        rights = ast.Tuple([thunk(self.visit(each)) for each in node.comparators], ast.Load())
        made = call(self.place.operators, "compare", constant(tuple(names)), self.visit(node.left), rights, site)
        return at(made, node)

    # ---- numbers

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Arithmetic on numbers that gives a float is done in the program's floating type, counters of loops too."""
        if self.is_real or not is_real_number(node, self.scope.numbers):
            return self._generic(node)
        self.is_real = True
        try:
            return self._generic(node)
        finally:
            self.is_real = False

    def real(self, node: ast.expr) -> ast.expr:
        """A number that a graph may hold as a whole number, as a float."""
        like = self.owner.like(self.scope, self.known)
        return at(call(self.place.operators, "real", node, like), node)

    # ---- calls, indices, names

    def visit_Call(self, node: ast.Call) -> ast.expr:
        arguments = [self.visit(each) for each in node.args]
        keywords = [self.visit(each) for each in node.keywords]
        return at(self._call_of(node, arguments, keywords), node)

    def _call_of(self, node: ast.Call, arguments: list[ast.expr], keywords: list[ast.keyword]) -> ast.expr:  # noqa: PLR0911 - a table
        function, operators = node.func, self.place.operators
        match function:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr=name):
                parent = [load("__class__"), load(self.scope.parameters[0]), ast.Constant(name)]
                return ast.Call(at(call(operators, "parent", *parent), function), arguments, keywords)
            case ast.Name(id="super") if not arguments:
                arguments = [load("__class__"), load(self.scope.parameters[0])]
                return ast.Call(function, arguments, keywords)
            case ast.Name(id="range") if self._is_builtin("range"):
                return call(operators, "range", *arguments)
            case ast.Name(id="int" | "float" | "bool" as kind) if self._is_builtin(kind) and len(arguments) == 1:
                return call(operators, "to_number", ast.Constant(kind), arguments[0])
            case ast.Attribute(value=value, attr="item") if not arguments:
                return call(operators, "item", self.visit(value))
            case ast.Name(id=name) if self._is_builtin(name) or name.startswith(INTERNAL):
                return ast.Call(function, arguments, keywords)
            case ast.Attribute() if self._is_library(function):
                return ast.Call(function, arguments, keywords)
            case ast.Attribute(value=value, attr=name):
                found = call(operators, "method", self.visit(value), ast.Constant(mangle(name, self.owner.class_name)))
                return ast.Call(at(found, function), arguments, keywords)
            case _:
                found = call(operators, "call", self.visit(function))
                return ast.Call(at(found, function), arguments, keywords)

    def _is_builtin(self, name: str) -> bool:
        return name not in self.scope.names | frozenset(self.scope.parameters) | self.hidden and self.owner.is_builtin(
            name
        )

    def _is_library(self, node: ast.Attribute) -> bool:
        """Whether it is `torch.relu`, `F.relu`, `math.sqrt`: an attribute of a library's module."""
        root = root_of(node)
        if root in self.scope.names or root in self.scope.parameters:
            return False
        module = self.scope.resolve(root)
        return isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] in {"torch", "math", "numpy"}

    def index(self, node: ast.expr) -> ast.expr:
        """What stands in brackets, as a value."""
        match node:
            case ast.Slice(lower=low, upper=up, step=step):
                parts = [ast.Constant(None) if each is None else self.visit(each) for each in (low, up, step)]
                return at(ast.Call(load("slice"), parts, []), node)
            case ast.Tuple(elts=elements) if any(isinstance(each, ast.Slice) for each in elements):
                return at(ast.Tuple([self.index(each) for each in elements], ast.Load()), node)
            case _:
                found: ast.expr = self.visit(node)
                return found

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        is_plain = isinstance(node.ctx, ast.Load) and not isinstance(node.slice, (ast.Constant, ast.Slice))
        if not is_plain or has_star(node.slice) or not reads(node.slice):
            return self._generic(node)
        made = call(self.place.operators, "get", self.visit(node.value), self.index(node.slice))
        return at(made, node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == UNDEFINED_NAME:
            return at(attribute(self.place.operators, "undefined"), node)
        if not isinstance(node.ctx, ast.Load) or node.id in self.hidden or node.id.startswith(INTERNAL):
            return node
        if self.is_real and node.id in self.scope.numbers and node.id in self.known:
            return self.real(node)
        if node.id not in self.scope.missing or node.id in self.known:
            return node
        return at(call(self.place.operators, "check", node, ast.Constant(node.id)), node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        hidden = frozenset(each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg))
        inner = Expressions(self.owner, self.scope, self.place, self.known | hidden, self.hidden | hidden)
        node.body = inner.visit(node.body)
        return at(call(self.place.operators, "mark", node), node)

    def visit_ListComp(self, node: ast.ListComp) -> ast.expr:
        return self._comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> ast.expr:
        return self._comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> ast.expr:
        return self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.expr:
        return self._comprehension(node)

    def _comprehension(self, node: Any) -> ast.expr:
        hidden = frozenset(name for each in node.generators for name in writes(each.target))
        inner = Expressions(self.owner, self.scope, self.place, self.known | hidden, self.hidden | hidden)
        for each in node.generators:
            each.iter = inner.visit(each.iter)
            each.ifs = [inner._checked(test) for test in each.ifs]
        for name in ("elt", "key", "value"):
            if hasattr(node, name):
                setattr(node, name, inner.visit(getattr(node, name)))
        return node  # type: ignore[no-any-return]

    def _checked(self, test: ast.expr) -> ast.expr:
        site = self.owner.make_site(test, "a comprehension", self.scope)
        return at(call(self.place.operators, "test", self.condition(test), site), test)

    def _generic(self, node: Any) -> ast.expr:
        self.generic_visit(node)
        return node  # type: ignore[no-any-return]


def has_walrus(node: ast.AST) -> bool:
    return any(isinstance(each, ast.NamedExpr) for each in ast.walk(node))


def has_star(node: ast.AST) -> bool:
    return any(isinstance(each, ast.Starred) for each in ast.walk(node))


def mangle(name: str, class_name: str | None) -> str:
    is_private = name.startswith("__") and not name.endswith("__")
    return f"_{class_name.lstrip('_')}{name}" if is_private and class_name else name
