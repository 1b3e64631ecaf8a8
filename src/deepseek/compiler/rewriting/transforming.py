"""A lowered syntax tree becomes one that calls the operators: a small function per branch, its variables in and out.

    if c: y = f(x)                   def _ds_then_1(_ds1, y): y = _ds1.call(f)(x); return (y,)
    else: y = y + 1        =>        def _ds_else_1(_ds1, y): y = y + 1; return (y,)
                                     (y,) = _ds0.cond(c, _ds_then_1, _ds_else_1, (y,), ("y",), site, (x,))

Variables that a branch only reads come to it as free variables; those that it may write are parameters where it may read
them first, and results where somebody reads them afterwards (`liveness`). `_ds0`, `_ds1`, ... are the operators of each
level, so that code can tell what was made outside of it. Every generated node carries the line and column of the
statement that it stands for, so that tracebacks and debuggers show the user's own lines.
"""

from __future__ import annotations

import ast
import builtins
import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepseek.compiler.rewriting.liveness import (
    NONE,
    Names,
    captured,
    declared,
    live_before,
    reads,
    surely_written,
    walk_scope,
    writes,
)
from deepseek.compiler.rewriting.lowering import is_guard, is_python, lower
from deepseek.compiler.rewriting.merging import INTERNAL
from deepseek.compiler.rewriting.operators import BINARY, COMPARISONS
from deepseek.compiler.rewriting.sites import Site

UNDEFINED_NAME = f"{INTERNAL}undefined"
SET = f"{INTERNAL}set"
APPEND = f"{INTERNAL}append"
SITES_NAME = f"{INTERNAL}sites"
MUTATORS = frozenset(
    "append extend insert pop remove clear sort reverse update setdefault popitem add discard appendleft popleft".split()
)
MAKERS = frozenset(
    "zeros ones empty full zeros_like ones_like empty_like full_like new_zeros new_ones new_full new_empty clone rand"
    " randn arange tensor eye linspace".split()
)


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


class Transformer:
    """Transforms one function definition; `sites` collects what it made."""

    def __init__(self, file: str, name: str, resolve: Callable[[str], Any], class_name: str | None = None) -> None:
        self.file = file
        self.name = name
        self.resolve = resolve
        self.class_name = class_name
        self.sites: list[Site] = []

    def is_builtin(self, name: str) -> bool:
        """Whether a name that no local variable has is Python's own."""
        return hasattr(builtins, name) and self.resolve(name) is getattr(builtins, name)

    # ---- functions

    def transform(self, tree: ast.FunctionDef, level: int = 0) -> ast.FunctionDef:
        """The definition with operators `_ds{level}` in scope; only the outermost takes them as its first parameter."""
        body = lower(name_writes(tree), f"{self.name} in {self.file}")
        scope = self._make_scope(tree, body)
        place = Place(level, dict.fromkeys(scope.names - frozenset(scope.parameters), level))
        block = self._block(body, frozenset(), scope, place, frozenset(scope.parameters))
        start = [self._undefined(name, place, tree) for name in sorted(scope.missing)]
        docstring = ast.get_docstring(tree, clean=False)
        head = [block.pop(0)] if docstring is not None and block and isinstance(block[0], ast.Expr) else []
        tree.body = [*head, *start, *block] or [ast.Pass()]
        return ast.fix_missing_locations(tree)

    def _make_scope(self, tree: ast.FunctionDef, body: list[ast.stmt]) -> Scope:
        parameters = parameters_of(tree)
        outside: dict[str, type[ast.Global] | type[ast.Nonlocal]] = {}
        for kind in (ast.Global, ast.Nonlocal):
            outside |= dict.fromkeys(declared(body, kind), kind)
        inner = [each for each in walk_scope(body) if isinstance(each, ast.FunctionDef)]
        moved = frozenset(name for each in inner for name in declared(each.body, ast.Nonlocal))
        names = writes(body) - frozenset(outside) - moved
        outside |= dict.fromkeys(moved & writes(body), ast.Nonlocal)
        fresh = find_fresh(body, frozenset(parameters))
        numbers = find_numbers(body, frozenset(parameters) | frozenset(outside))
        return Scope(tree.name, self.file, parameters, names, outside, captured(body), fresh, numbers, self.resolve)

    def _undefined(self, name: str, place: Place, at: ast.AST) -> ast.stmt:
        value = _attribute(place.operators, "undefined")
        return _at(ast.Assign(targets=[_store(name)], value=value), at)

    # ---- blocks

    def _block(
        self,
        statements: list[ast.stmt],
        after: Names,
        scope: Scope,
        place: Place,
        known: Names,
        head: Names = NONE,
        end: Names = NONE,
    ) -> list[ast.stmt]:
        """The statements transformed; `after` is read after them, `known` has a value before them."""
        result: list[ast.stmt] = []
        for index, statement in enumerate(statements):
            live = live_before(statements[index + 1 :], after, head, end) | (scope.shared & scope.names)
            result.extend(self._statement(statement, live, scope, place, known, head, end))
            known |= surely_written([statement])
        return result

    def _statement(
        self, node: ast.stmt, after: Names, scope: Scope, place: Place, known: Names, head: Names, end: Names
    ) -> list[ast.stmt]:
        rewrite = Expressions(self, scope, place, known)
        match node:
            case ast.If() if getattr(node, "stays_native", False) or is_python(node.test):
                return self._native(node, after, scope, place, known, head, end, "a condition")
            case ast.If() if is_guard(node):
                return [self._guard(node, scope, place, rewrite)]
            case ast.If():
                return self._if(node, after, scope, place, known)
            case ast.While() | ast.For() if getattr(node, "stays_native", False):
                return self._native_loop(node, after, scope, place, known, end)
            case ast.While():
                return self._while(node, after, scope, place, known)
            case ast.For():
                return self._for(node, after, scope, place, known)
            case ast.With() | ast.Try() | ast.Match():
                return self._native(node, after, scope, place, known, head, end, "try")
            case ast.FunctionDef():
                return self._function(node, place)
            case ast.AsyncFunctionDef() | ast.ClassDef() | ast.Global() | ast.Nonlocal() | ast.Import():
                return [node]
            case ast.Assert():
                return [self._assert(node, scope, place, rewrite)]
            case ast.Delete(targets=targets) if all(isinstance(each, ast.Name) for each in targets):
                return [self._undefined(each.id, place, node) for each in targets if isinstance(each, ast.Name)]
            case ast.AugAssign():
                return self._augment(node, scope, place, rewrite)
            case ast.Assign() | ast.AnnAssign():
                return self._assign(node, scope, place, rewrite)
            case ast.Expr():
                return [*self._effects(node.value, scope, place), rewrite.visit(node)]
            case _:
                return [rewrite.visit(node)]

    def _native(
        self, node: Any, after: Names, scope: Scope, place: Place, known: Names, head: Names, end: Names, kind: str
    ) -> list[ast.stmt]:
        """A statement that stays Python, with what is inside transformed."""
        rewrite = Expressions(self, scope, place, known)
        if isinstance(node, ast.If):
            is_checked = not is_python(node.test)
            site = self._site(node, kind, scope)
            node.test = rewrite.visit(node.test) if is_checked else rewrite.condition(node.test)
            if is_checked:
                node.test = _at(_call(place.operators, "test", node.test, site), node.test)
        for item in getattr(node, "items", []):
            item.context_expr = rewrite.visit(item.context_expr)
        if isinstance(node, (ast.Try, ast.Match)):
            after = after | reads(node)
        inside = known | frozenset(name for item in getattr(node, "items", []) for name in writes(item))
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if block:
                setattr(node, name, self._block(block, after, scope, place, inside, head, end))
        for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
            part.body = self._block(part.body, after, scope, place, known, head, end)
        return [node]

    def _native_loop(
        self, node: ast.While | ast.For, after: Names, scope: Scope, place: Place, known: Names, end: Names
    ) -> list[ast.stmt]:
        rewrite = Expressions(self, scope, place, known)
        live = live_before([node], after)
        if isinstance(node, ast.While):
            site = self._site(node, "a loop", scope)
            test = rewrite.condition(node.test)
            node.test = _at(_call(place.operators, "test", test, site), test)
        else:
            site = self._site(node, "a loop", scope)
            node.iter = _at(_call(place.operators, "iterate", rewrite.visit(node.iter), site), node.iter)
            known = known | writes(node.target)
        orelse = live_before(node.orelse, after)
        node.body = self._block(node.body, live | orelse | after, scope, place, known, live | orelse, after)
        node.orelse = self._block(node.orelse, after, scope, place, known)
        return [node]

    def _function(self, node: ast.FunctionDef, place: Place) -> list[ast.stmt]:
        inner = Transformer(self.file, f"{self.name}.{node.name}", self.resolve, self.class_name)
        inner.sites = self.sites
        changed = inner.transform(node, place.level) if not is_special(node) else node
        if node.decorator_list or is_special(node):
            return [changed]
        mark = ast.Assign(targets=[_store(node.name)], value=_call(place.operators, "mark", _load(node.name)))
        return [changed, _at(mark, node)]

    # ---- checks

    def _assert(self, node: ast.Assert, scope: Scope, place: Place, rewrite: Expressions) -> ast.stmt:
        site = self._site(node, "assert", scope)
        message = ast.Constant(None) if node.msg is None else _thunk(rewrite.visit(node.msg))
        return _at(ast.Expr(_call(place.operators, "assert_", rewrite.condition(node.test), message, site)), node)

    def _guard(self, node: ast.If, scope: Scope, place: Place, rewrite: Expressions) -> ast.stmt:
        error = node.body[0]
        assert isinstance(error, ast.Raise)
        assert error.exc is not None
        if error.cause is not None:
            node.test = rewrite.condition(node.test)
            return node
        site = self._site(node, "raise", scope)
        test = rewrite.condition(node.test)
        return _at(ast.Expr(_call(place.operators, "raise_if", test, _thunk(rewrite.visit(error.exc)), site)), node)

    # ---- choosing and looping

    def _if(self, node: ast.If, after: Names, scope: Scope, place: Place, known: Names) -> list[ast.stmt]:
        gives_result = getattr(node, "gives_result", False)
        test = Expressions(self, scope, place, known).condition(node.test)
        known |= writes(node.test)
        bound = (writes(node.body) | writes(node.orelse)) & scope.names - scope.shared
        outs = [] if gives_result else sorted(bound & after)
        flowing = frozenset(outs)
        needed = live_before(node.body, flowing) | live_before(node.orelse, flowing)
        needed |= flowing - (surely_written(node.body) & surely_written(node.orelse))
        ins = sorted((bound & needed) | self._read_only([*node.body, *node.orelse], bound, scope, known))
        self._note_missing(ins, scope, known)
        then = self._part("then", node, node.body, ins, None if gives_result else outs, scope, place, known, bound)
        other = self._part("else", node, node.orelse, ins, None if gives_result else outs, scope, place, known, bound)
        site = self._site(node, "if", scope)
        call = _call(
            place.operators,
            "cond",
            test,
            _load(then.name),
            _load(other.name),
            _tuple(ins),
            ast.Constant(None) if gives_result else ast.Constant(tuple(outs)),
            site,
            self._like(scope, known),
        )
        if gives_result:
            return [then, other, _at(ast.Return(call), node)]
        return [then, other, self._bind(outs, call, node)]

    def _while(self, node: ast.While, after: Names, scope: Scope, place: Place, known: Names) -> list[ast.stmt]:
        stop = getattr(node, "stop", None)
        if any(isinstance(each, ast.NamedExpr) for each in ast.walk(node.test)):
            return self._while_with_walrus(node, after, scope, place, known)
        bound = writes(node.body) & scope.names - scope.shared
        head = live_before([node], after)
        carried = sorted(bound & (head | after) | ({stop} if stop else frozenset()))
        self._note_missing(carried, scope, known)
        inner = known | frozenset(name for name in carried if name in known)
        deeper = place.deeper(bound)
        test = self._define("test", node, deeper, carried, scope)
        condition = Expressions(self, scope, deeper, inner).condition(node.test)
        test.body = [_at(ast.Return(condition), node.test)]
        flow = head | after | (frozenset({stop}) if stop else NONE)
        extras = sorted(self._read_only(node.body, bound, scope, known))
        body = self._part("turn", node, node.body, [*carried, *extras], carried, scope, place, inner, bound, flow)
        call = _call(
            place.operators,
            "while_",
            _load(test.name),
            _load(body.name),
            _tuple(carried),
            ast.Constant(tuple(carried)),
            ast.Constant(carried.index(stop) if stop else None),
            self._site(node, "while", scope),
            self._like(scope, known),
            _tuple(extras),
        )
        return [test, body, self._bind(carried, call, node)]

    def _while_with_walrus(
        self, node: ast.While, after: Names, scope: Scope, place: Place, known: Names
    ) -> list[ast.stmt]:
        """`while (n := f()) > 0` as an endless loop whose first statement leaves it."""
        stop = getattr(node, "stop", None) or f"{INTERNAL}stop_{node.lineno}_{node.col_offset}"
        inside = ast.If(test=node.test, body=node.body, orelse=[_at(_set(stop, True), node)])
        node.test = _at(ast.Constant(True), node.test)
        node.body = [_at(inside, node)]
        node.stop = stop  # type: ignore[attr-defined]
        scope.names |= {stop}
        place.owners[stop] = place.level
        start = _at(_set(stop, False), node)
        return [start, *self._while(node, after, scope, place, known | {stop})]

    def _for(self, node: ast.For, after: Names, scope: Scope, place: Place, known: Names) -> list[ast.stmt]:
        stop = getattr(node, "stop", None)
        items = Expressions(self, scope, place, known).visit(node.iter)
        bound = (writes(node.body) | writes(node.target)) & scope.names - scope.shared
        head = live_before([node], after)
        carried = sorted(bound & (head | after) | ({stop} if stop else frozenset()))
        self._note_missing(carried, scope, known)
        site = self._site(node, "for", scope, is_plain_counter=_is_plain_counter(node))
        take = _at(ast.Assign(targets=[node.target], value=_load(f"{INTERNAL}item")), node.target)
        flow = head | after | (frozenset({stop}) if stop else NONE)
        extras = sorted(self._read_only(node.body, bound, scope, known))
        body = self._part(
            "turn", node, [take, *node.body], [*carried, *extras], carried, scope, place, known, bound, flow
        )
        body.args.args.insert(1, ast.arg(arg=f"{INTERNAL}item"))
        call = _call(
            place.operators,
            "for_",
            items,
            _load(body.name),
            _tuple(carried),
            ast.Constant(tuple(carried)),
            ast.Constant(carried.index(stop) if stop else None),
            site,
            self._like(scope, known),
            _tuple(extras),
        )
        return [body, self._bind(carried, call, node)]

    def _part(
        self,
        kind: str,
        node: ast.stmt,
        statements: list[ast.stmt],
        ins: Sequence[str],
        outs: Sequence[str] | None,
        scope: Scope,
        place: Place,
        known: Names,
        bound: Names,
        flow: Names | None = None,
    ) -> ast.FunctionDef:
        """The function of one branch: `ins` are its parameters, `outs` its result (none: it returns one itself)."""
        made_here = bound - known - frozenset(ins)
        deeper = place.deeper(made_here | frozenset(scope_locals(statements, scope, known)))
        part = self._define(kind, node, deeper, ins, scope)
        part.body = self._declare_outside(statements, scope)
        inside = known - (bound - frozenset(ins))  # what is written first in here has no value before
        leaving = (frozenset(outs) if outs is not None else NONE) if flow is None else flow
        part.body += self._block(statements, leaving, scope, deeper, inside)
        if outs is not None:
            part.body.append(_at(ast.Return(_tuple(outs)), node))
        part.body = part.body or [_at(ast.Pass(), node)]
        return part

    def _define(self, kind: str, node: ast.stmt, place: Place, names: Sequence[str], scope: Scope) -> ast.FunctionDef:
        scope.num_parts += 1
        arguments = ast.arguments(
            posonlyargs=[],
            args=[ast.arg(arg=place.operators), *(ast.arg(arg=name) for name in names)],
            kwonlyargs=[],
            kw_defaults=[],
            defaults=[],
        )
        name = f"{INTERNAL}{kind}_{scope.num_parts}"
        part = ast.FunctionDef(name=name, args=arguments, body=[], decorator_list=[], type_params=[])
        return ast.copy_location(part, node)

    def _declare_outside(self, statements: list[ast.stmt], scope: Scope) -> list[ast.stmt]:
        written = writes(statements)
        lines: list[ast.stmt] = []
        for kind in (ast.Global, ast.Nonlocal):
            names = sorted(name for name in written if scope.outside.get(name) is kind)
            if kind is ast.Nonlocal:
                names = sorted({*names, *(written & scope.shared & scope.names)})
            if names:
                lines.append(_at(kind(names=names), statements[0]))
        return lines

    def _read_only(self, nodes: Sequence[ast.AST], bound: Names, scope: Scope, known: Names) -> Names:
        """Variables with a value that a branch reads and does not write: they come in as parameters, too."""
        read = frozenset(name for node in nodes for name in reads(node))
        return ((read & (scope.names | frozenset(scope.parameters)) & known) - bound) - scope.shared

    def _bind(self, names: Sequence[str], call: ast.expr, node: ast.stmt) -> ast.stmt:
        if not names:
            return _at(ast.Expr(call), node)
        target = ast.Tuple([_store(name) for name in names], ast.Store())
        return _at(ast.Assign(targets=[target], value=call), node)

    def _note_missing(self, names: Sequence[str], scope: Scope, known: Names) -> None:
        scope.missing |= frozenset(names) - known

    def _like(self, scope: Scope, known: Names) -> ast.expr:
        return _tuple([name for name in scope.parameters if name in known])

    # ---- changes

    def _assign(
        self, node: ast.Assign | ast.AnnAssign, scope: Scope, place: Place, rewrite: Expressions
    ) -> list[ast.stmt]:
        if getattr(getattr(node.value, "func", None), "id", "") == APPEND:
            return [self._append(node, node.value.args, place, rewrite)]  # type: ignore[union-attr]
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == SET:
            return [self._set(node, node.value.args, scope, place, rewrite)]
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        effects = [line for target in targets for line in self._target_effects(target, node, scope, place)]
        return [*effects, rewrite.visit(node)]

    def _append(self, node: ast.stmt, parts: list[ast.expr], place: Place, rewrite: Expressions) -> ast.stmt:
        assert isinstance(parts[0], ast.Name)
        name = parts[0].id
        call = _call(place.operators, "append", rewrite.visit(parts[0]), rewrite.visit(parts[1]), place.owner(name))
        return _at(ast.Assign(targets=[_store(name)], value=call), node)

    def _set(
        self, node: ast.stmt, parts: list[ast.expr], scope: Scope, place: Place, rewrite: Expressions
    ) -> ast.stmt:
        """`x[index] = value` for a tensor that is seen nowhere else."""
        assert isinstance(parts[0], ast.Name)
        name = parts[0].id
        site = self._site(node, "assignment", scope)
        value = rewrite.visit(parts[2])
        call = _call(place.operators, "set", rewrite.visit(parts[0]), rewrite.index(parts[1]), value, site)
        call.args.insert(3, place.owner(name))
        return _at(ast.Assign(targets=[_store(name)], value=call), node)

    def _augment(self, node: ast.AugAssign, scope: Scope, place: Place, rewrite: Expressions) -> list[ast.stmt]:
        operation = type(node.op).__name__
        if not isinstance(node.target, ast.Name):
            return [*self._target_effects(node.target, node, scope, place), rewrite.visit(node)]
        name = node.target.id
        if name in scope.outside or operation not in BINARY:
            return [*self._target_effects(node.target, node, scope, place), rewrite.visit(node)]
        is_real = name in scope.numbers and is_real_number(ast.BinOp(_load(name), node.op, node.value), scope.numbers)
        call = _call(
            place.operators,
            "augment",
            ast.Constant(operation),
            rewrite.real(_load(name)) if is_real else rewrite.visit(_load(name)),
            rewrite.visit(node.value),
            place.owner(name),
            ast.Constant(name in scope.fresh),
            self._site(node, "assignment", scope),
        )
        return [_at(ast.Assign(targets=[_store(name)], value=call), node)]

    def _target_effects(self, target: ast.expr, node: ast.stmt, scope: Scope, place: Place) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for each in walk_scope(target):
            is_outside = isinstance(each, ast.Name) and (
                each.id in scope.outside or (each.id in scope.shared & scope.names and place.level > 0)
            )
            is_part = isinstance(each, (ast.Attribute, ast.Subscript)) and isinstance(each.ctx, ast.Store)
            if is_outside:
                found.append(self._effect(ast.Constant(None), node, scope, place))
            elif is_part:
                found.append(self._effect(place.owner(_root(each)), node, scope, place))
        return found

    def _effects(self, value: ast.expr, scope: Scope, place: Place) -> list[ast.stmt]:
        """A guard before a call that changes what it is called on: `outs.append(y)`, `h.add_(1)`."""
        match value:
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                is_in_place = name.endswith("_") and not name.endswith("__")
                if name in MUTATORS or is_in_place:
                    return [self._effect(place.owner(_root(owner)), value, scope, place)]
        return []

    def _effect(self, owner: ast.expr, node: ast.AST, scope: Scope, place: Place) -> ast.stmt:
        site = self._site(node, "a change", scope)
        return _at(ast.Expr(_call(place.operators, "effect", owner, site)), node)

    def _site(self, node: Any, kind: str, scope: Scope, *, is_plain_counter: bool = False) -> ast.expr:
        self.sites.append(Site(self.file, node.lineno, kind, scope.name, is_plain_counter=is_plain_counter))
        index = ast.Constant(len(self.sites) - 1)
        return ast.Subscript(_load(SITES_NAME), index, ast.Load())

    def make_site(self, node: ast.AST, kind: str, scope: Scope) -> ast.expr:
        """For expressions: a site at `node`."""
        return self._site(node, kind, scope)


class Expressions(ast.NodeTransformer):
    """Rewrites the expressions of one statement: conditions, calls, numbers taken out of tensors."""

    def __init__(
        self, owner: Transformer, scope: Scope, place: Place, known: Names, hidden: Names = NONE
    ) -> None:
        self.owner = owner
        self.scope = scope
        self.place = place
        self.known = known
        self.hidden = hidden  # names that a lambda or a comprehension around binds
        self.is_real = False  # inside arithmetic on numbers that gives a float

    # ---- conditions

    def condition(self, node: ast.expr) -> ast.expr:
        """An expression of which only the truth matters."""
        match node:
            case ast.BoolOp(op=op, values=values) if not _has_walrus(node):
                return self._join(isinstance(op, ast.And), values, node)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                site = self.owner.make_site(node, "not", self.scope)
                return _at(_call(self.place.operators, "not_", self.condition(operand), site), node)
            case _:
                return self.visit(node)

    def _join(self, is_and: bool, values: list[ast.expr], node: ast.expr) -> ast.expr:
        result = self.condition(values[0])
        for value in values[1:]:
            site = self.owner.make_site(node, "a condition", self.scope)
            name = "and_" if is_and else "or_"
            result = _at(_call(self.place.operators, name, result, _thunk(self.condition(value)), site), node)
        return result

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        """`a and b` as a value: one of both."""
        if _has_walrus(node):
            return self._generic(node)
        result = self.visit(node.values[0])
        for value in node.values[1:]:
            right, same = self._branch(value), self._branch(None)
            branches = (right, same) if isinstance(node.op, ast.And) else (same, right)
            result = self._choose(result, branches, node, names=("_ds_value",))
        return result

    def _branch(self, value: ast.expr | None) -> ast.expr:
        deeper = self.place.deeper(NONE)
        names = [deeper.operators, f"{INTERNAL}value"]
        body = (
            _load(names[1]) if value is None else Expressions(self.owner, self.scope, deeper, self.known, self.hidden).visit(value)
        )
        return ast.Lambda(_arguments(names), body)

    def _choose(
        self, test: ast.expr, branches: tuple[ast.expr, ast.expr], node: ast.AST, names: tuple[str, ...]
    ) -> ast.expr:
        """`cond` on a value computed once, which both branches receive."""
        site = self.owner.make_site(node, "a condition", self.scope)
        like = self.owner._like(self.scope, self.known)
        call = _call(self.place.operators, "either", test, *branches, site, like)
        return _at(call, node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        if _has_walrus(node):
            return self._generic(node)
        test = self.condition(node.test)
        if is_python(node.test):
            return _at(ast.IfExp(test, self.visit(node.body), self.visit(node.orelse)), node)
        deeper = self.place.deeper(NONE)
        inner = Expressions(self.owner, self.scope, deeper, self.known, self.hidden)
        names = sorted(self.owner._read_only([node.body, node.orelse], self.hidden, self.scope, self.known))
        branches = [
            ast.Lambda(_arguments([deeper.operators, *names]), inner.visit(each)) for each in (node.body, node.orelse)
        ]
        site = self.owner.make_site(node, "a conditional expression", self.scope)
        call = _call(
            self.place.operators,
            "cond",
            test,
            *branches,
            _tuple(names),
            ast.Constant(None),
            site,
            self.owner._like(self.scope, self.known),
        )
        return _at(call, node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        return self.condition(node) if isinstance(node.op, ast.Not) else self._generic(node)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        names = [type(op).__name__ for op in node.ops]
        if len(names) == 1 or any(name not in COMPARISONS for name in names) or _has_walrus(node):
            return self._generic(node)
        site = self.owner.make_site(node, "a comparison", self.scope)
        rights = ast.Tuple([_thunk(self.visit(each)) for each in node.comparators], ast.Load())
        call = _call(self.place.operators, "compare", ast.Constant(tuple(names)), self.visit(node.left), rights, site)
        return _at(call, node)

    # ---- numbers

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Arithmetic on numbers that gives a float is done in the program's floating type, also on counters of loops."""
        if self.is_real or not is_real_number(node, self.scope.numbers):
            return self._generic(node)
        self.is_real = True
        try:
            return self._generic(node)
        finally:
            self.is_real = False

    def real(self, node: ast.expr) -> ast.expr:
        """A number that a graph may hold as a whole number, as a float."""
        like = self.owner._like(self.scope, self.known)
        return _at(_call(self.place.operators, "real", node, like), node)

    # ---- calls, indices, names

    def visit_Call(self, node: ast.Call) -> ast.expr:
        arguments = [self.visit(each) for each in node.args]
        keywords = [self.visit(each) for each in node.keywords]
        return _at(self._call_of(node, arguments, keywords), node)

    def _call_of(self, node: ast.Call, arguments: list[ast.expr], keywords: list[ast.keyword]) -> ast.expr:
        function, operators = node.func, self.place.operators
        match function:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr=name):
                parent = [_load("__class__"), _load(self.scope.parameters[0]), ast.Constant(name)]
                return ast.Call(_at(_call(operators, "parent", *parent), function), arguments, keywords)
            case ast.Name(id="super") if not arguments:
                arguments = [_load("__class__"), _load(self.scope.parameters[0])]
                return ast.Call(function, arguments, keywords)
            case ast.Name(id="range") if self._is_builtin("range"):
                return _call(operators, "range", *arguments)
            case ast.Name(id="int" | "float" | "bool" as kind) if self._is_builtin(kind) and len(arguments) == 1:
                return _call(operators, "to_number", ast.Constant(kind), arguments[0])
            case ast.Attribute(value=value, attr="item") if not arguments:
                return _call(operators, "item", self.visit(value))
            case ast.Name(id=name) if self._is_builtin(name) or name.startswith(INTERNAL):
                return ast.Call(function, arguments, keywords)
            case ast.Attribute() if self._is_library(function):
                return ast.Call(function, arguments, keywords)
            case ast.Attribute(value=value, attr=name):
                found = _call(operators, "method", self.visit(value), ast.Constant(_mangle(name, self.owner.class_name)))
                return ast.Call(_at(found, function), arguments, keywords)
            case _:
                found = _call(operators, "call", self.visit(function))
                return ast.Call(_at(found, function), arguments, keywords)

    def _is_builtin(self, name: str) -> bool:
        return name not in self.scope.names | frozenset(self.scope.parameters) | self.hidden and self.owner.is_builtin(name)

    def _is_library(self, node: ast.Attribute) -> bool:
        """Whether it is `torch.relu`, `F.relu`, `math.sqrt`: an attribute of a library's module."""
        root = _root(node)
        if root in self.scope.names or root in self.scope.parameters:
            return False
        module = self.scope.resolve(root)
        return isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] in {"torch", "math", "numpy"}

    def index(self, node: ast.expr) -> ast.expr:
        """What stands in brackets, as a value."""
        match node:
            case ast.Slice(lower=low, upper=up, step=step):
                parts = [ast.Constant(None) if each is None else self.visit(each) for each in (low, up, step)]
                return _at(ast.Call(_load("slice"), parts, []), node)
            case ast.Tuple(elts=elements) if any(isinstance(each, ast.Slice) for each in elements):
                return _at(ast.Tuple([self.index(each) for each in elements], ast.Load()), node)
            case _:
                return self.visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        is_plain = isinstance(node.ctx, ast.Load) and not isinstance(node.slice, (ast.Constant, ast.Slice))
        if not is_plain or _has_star(node.slice) or not reads(node.slice):
            return self._generic(node)
        call = _call(self.place.operators, "get", self.visit(node.value), self.index(node.slice))
        return _at(call, node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == UNDEFINED_NAME:
            return _at(_attribute(self.place.operators, "undefined"), node)
        if not isinstance(node.ctx, ast.Load) or node.id in self.hidden or node.id.startswith(INTERNAL):
            return node
        if self.is_real and node.id in self.scope.numbers and node.id in self.known:
            return self.real(node)
        if node.id not in self.scope.missing or node.id in self.known:
            return node
        return _at(_call(self.place.operators, "check", node, ast.Constant(node.id)), node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        hidden = frozenset(each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg))
        inner = Expressions(self.owner, self.scope, self.place, self.known | hidden, self.hidden | hidden)
        node.body = inner.visit(node.body)
        return _at(_call(self.place.operators, "mark", node), node)

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
        return _at(_call(self.place.operators, "test", self.condition(test), site), test)

    def _generic(self, node: Any) -> ast.expr:
        self.generic_visit(node)
        return node  # type: ignore[no-any-return]


# ---- what a function's text tells


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

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        match node.value:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value], keywords=[]):
                if name in self.fresh and not isinstance(value, ast.Starred):
                    call = ast.Call(_load(APPEND), [_load(name), value], [])
                    return _at(ast.Assign(targets=[_store(name)], value=call), node)
        return node

    visit_Lambda = visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        if len(node.targets) > 1 or not self._is_fresh_part(target):
            return node
        return self._write(target, node.value, node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not self._is_fresh_part(node.target):
            return node
        now = copy.deepcopy(node.target)
        now.ctx = ast.Load()  # type: ignore[attr-defined]
        return self._write(node.target, _at(ast.BinOp(now, node.op, node.value), node), node)

    def _is_fresh_part(self, target: ast.expr) -> bool:
        is_part = isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)
        return is_part and _root(target) in self.fresh

    def _write(self, target: Any, value: ast.expr, node: ast.stmt) -> ast.AST:
        name = target.value.id
        call = ast.Call(_load(SET), [_load(name), target.slice, value], [])
        return _at(ast.Assign(targets=[_store(name)], value=call), node)


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
                found.add(_root(value))
    return frozenset(found)


def _is_part_of(target: ast.expr, tensors: set[str]) -> bool:
    return isinstance(target, ast.Subscript) and _root(target) in tensors


def scope_locals(statements: list[ast.stmt], scope: Scope, known: Names) -> Names:
    """Variables that `statements` are the first to write."""
    return (writes(statements) & scope.names) - known


def _is_plain_counter(node: ast.For) -> bool:
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


def _root(node: ast.AST) -> str:
    """The name at the left end of `a.b[c].d`, or nothing."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _has_walrus(node: ast.AST) -> bool:
    return any(isinstance(each, ast.NamedExpr) for each in ast.walk(node))


def _has_star(node: ast.AST) -> bool:
    return any(isinstance(each, ast.Starred) for each in ast.walk(node))


def _mangle(name: str, class_name: str | None) -> str:
    is_private = name.startswith("__") and not name.endswith("__")
    return f"_{class_name.lstrip('_')}{name}" if is_private and class_name else name


# ---- small trees


def _at(node: Any, at: ast.AST) -> Any:
    return ast.fix_missing_locations(ast.copy_location(node, at))


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _store(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def _set(name: str, value: bool) -> ast.stmt:
    return ast.Assign(targets=[_store(name)], value=ast.Constant(value))


def _attribute(name: str, attribute: str) -> ast.Attribute:
    return ast.Attribute(_load(name), attribute, ast.Load())


def _call(operators: str, name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(_attribute(operators, name), list(arguments), [])


def _tuple(names: Sequence[str]) -> ast.Tuple:
    return ast.Tuple([_load(name) for name in names], ast.Load())


def _arguments(names: Sequence[str]) -> ast.arguments:
    return ast.arguments(
        posonlyargs=[], args=[ast.arg(arg=name) for name in names], kwonlyargs=[], kw_defaults=[], defaults=[]
    )


def _thunk(body: ast.expr) -> ast.Lambda:
    return ast.Lambda(_arguments([]), body)


