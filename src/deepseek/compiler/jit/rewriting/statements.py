"""A lowered syntax tree becomes one that calls the operators: a small function per branch, its variables in and out.

    if c: y = f(x)                   def _ds_then_1(_ds1, y): y = _ds1.call(f)(x); return (y,)
    else: y = y + 1        =>        def _ds_else_1(_ds1, y): y = y + 1; return (y,)
                                     (y,) = _ds0.cond(c, _ds_then_1, _ds_else_1, (y,), ("y",), site, (x,))

Variables that a branch only reads come to it as free variables; those that it may write are parameters where it may
read them first, and results where somebody reads them afterwards (`liveness`). `_ds0`, `_ds1`, ... are the operators
of each level, so that code can tell what was made outside of it. Every generated node carries the line and column of
the statement that it stands for, so that tracebacks and debuggers show the user's own lines.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Sequence
from typing import Any

from deepseek.compiler.jit.rewriting.aliasing import (
    APPEND,
    SET,
    find_fresh,
    find_numbers,
    is_plain_counter,
    is_real_number,
    is_special,
    name_writes,
    parameters_of,
    root_of,
)
from deepseek.compiler.jit.rewriting.expressions import Expressions, Place, Scope
from deepseek.compiler.jit.rewriting.lowering import is_guard, is_python, lower, mark
from deepseek.compiler.jit.rewriting.trees import (
    assign,
    assign_constant,
    at,
    attribute,
    call,
    constant,
    function_of,
    load,
    store,
    thunk,
    tuple_of,
)
from deepseek.compiler.jit.rewriting.variables import (
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
from deepseek.compiler.jit.tracing.merging import INTERNAL
from deepseek.compiler.jit.tracing.operators import BINARY
from deepseek.compiler.jit.tracing.sites import Site

SITES_NAME = f"{INTERNAL}sites"
MUTATORS = frozenset(
    "append extend insert pop remove clear sort reverse update setdefault popitem add discard".split()  # noqa: SIM905
)


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

    def _undefined(self, name: str, place: Place, where: ast.AST) -> ast.stmt:
        return assign(name, attribute(place.operators, "undefined"), where)

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

    def _statement(  # noqa: PLR0911, PLR0912 - a table
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
                node.test = at(call(place.operators, "test", node.test, site), node.test)
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
            node.test = at(call(place.operators, "test", test, site), test)
        else:
            site = self._site(node, "a loop", scope)
            node.iter = at(call(place.operators, "iterate", rewrite.visit(node.iter), site), node.iter)
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
        return [changed, assign(node.name, call(place.operators, "mark", load(node.name)), node)]

    # ---- checks

    def _assert(self, node: ast.Assert, scope: Scope, place: Place, rewrite: Expressions) -> ast.stmt:
        site = self._site(node, "assert", scope)
        message = ast.Constant(None) if node.msg is None else thunk(rewrite.visit(node.msg))
        return at(ast.Expr(call(place.operators, "assert_", rewrite.condition(node.test), message, site)), node)

    def _guard(self, node: ast.If, scope: Scope, place: Place, rewrite: Expressions) -> ast.stmt:
        error = node.body[0]
        assert isinstance(error, ast.Raise)
        assert error.exc is not None
        if error.cause is not None:
            node.test = rewrite.condition(node.test)
            return node
        site = self._site(node, "raise", scope)
        test = rewrite.condition(node.test)
        return at(ast.Expr(call(place.operators, "raise_if", test, thunk(rewrite.visit(error.exc)), site)), node)

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
        ins = sorted((bound & needed) | self.read_only([*node.body, *node.orelse], bound, scope, known))
        self._note_missing(ins, scope, known)
        then = self._part("then", node, node.body, ins, None if gives_result else outs, scope, place, known, bound)
        other = self._part("else", node, node.orelse, ins, None if gives_result else outs, scope, place, known, bound)
        site = self._site(node, "if", scope)
        made = call(
            place.operators,
            "cond",
            test,
            load(then.name),
            load(other.name),
            tuple_of(ins),
            ast.Constant(None) if gives_result else constant(tuple(outs)),
            site,
            self.like(scope, known),
        )
        if gives_result:
            return [then, other, at(ast.Return(made), node)]
        return [then, other, self._bind(outs, made, node)]

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
        test.body = [at(ast.Return(condition), node.test)]
        flow = head | after | (frozenset({stop}) if stop else NONE)
        extras = sorted(self.read_only(node.body, bound, scope, known))
        body = self._part("turn", node, node.body, [*carried, *extras], carried, scope, place, inner, bound, flow)
        made = call(
            place.operators,
            "while_",
            load(test.name),
            load(body.name),
            tuple_of(carried),
            constant(tuple(carried)),
            ast.Constant(carried.index(stop) if stop else None),
            self._site(node, "while", scope),
            self.like(scope, known),
            tuple_of(extras),
        )
        return [test, body, self._bind(carried, made, node)]

    def _while_with_walrus(
        self, node: ast.While, after: Names, scope: Scope, place: Place, known: Names
    ) -> list[ast.stmt]:
        """`while (n := f()) > 0` as an endless loop whose first statement leaves it."""
        stop = getattr(node, "stop", None) or f"{INTERNAL}stop_{node.lineno}_{node.col_offset}"
        inside = ast.If(test=node.test, body=node.body, orelse=[at(assign_constant(stop, True), node)])
        node.test = at(ast.Constant(True), node.test)
        node.body = [at(inside, node)]
        mark(node, stop=stop)
        scope.names |= {stop}
        place.owners[stop] = place.level
        start = at(assign_constant(stop, False), node)
        return [start, *self._while(node, after, scope, place, known | {stop})]

    def _for(self, node: ast.For, after: Names, scope: Scope, place: Place, known: Names) -> list[ast.stmt]:
        stop = getattr(node, "stop", None)
        items = Expressions(self, scope, place, known).visit(node.iter)
        bound = (writes(node.body) | writes(node.target)) & scope.names - scope.shared
        head = live_before([node], after)
        carried = sorted(bound & (head | after) | ({stop} if stop else frozenset()))
        self._note_missing(carried, scope, known)
        site = self._site(node, "for", scope, is_plain_counter=is_plain_counter(node))
        take = at(ast.Assign(targets=[node.target], value=load(f"{INTERNAL}item")), node.target)
        flow = head | after | (frozenset({stop}) if stop else NONE)
        extras = sorted(self.read_only(node.body, bound, scope, known))
        body = self._part(
            "turn", node, [take, *node.body], [*carried, *extras], carried, scope, place, known, bound, flow
        )
        body.args.args.insert(1, ast.arg(arg=f"{INTERNAL}item"))
        made = call(
            place.operators,
            "for_",
            items,
            load(body.name),
            tuple_of(carried),
            constant(tuple(carried)),
            ast.Constant(carried.index(stop) if stop else None),
            site,
            self.like(scope, known),
            tuple_of(extras),
        )
        return [body, self._bind(carried, made, node)]

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
        deeper = place.deeper(made_here | ((writes(statements) & scope.names) - known))
        part = self._define(kind, node, deeper, ins, scope)
        part.body = self._declare_outside(statements, scope)
        inside = known - (bound - frozenset(ins))  # what is written first in here has no value before
        leaving = (frozenset(outs) if outs is not None else NONE) if flow is None else flow
        part.body += self._block(statements, leaving, scope, deeper, inside)
        if outs is not None:
            part.body.append(at(ast.Return(tuple_of(outs)), node))
        part.body = part.body or [at(ast.Pass(), node)]
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
        part = function_of(name, arguments, [])
        return ast.copy_location(part, node)

    def _declare_outside(self, statements: list[ast.stmt], scope: Scope) -> list[ast.stmt]:
        written = writes(statements)
        lines: list[ast.stmt] = []
        for kind in (ast.Global, ast.Nonlocal):
            names = sorted(name for name in written if scope.outside.get(name) is kind)
            if kind is ast.Nonlocal:
                names = sorted({*names, *(written & scope.shared & scope.names)})
            if names:
                lines.append(at(kind(names=names), statements[0]))
        return lines

    def read_only(self, nodes: Sequence[ast.AST], bound: Names, scope: Scope, known: Names) -> Names:
        """Variables with a value that a branch reads and does not write: they come in as parameters, too."""
        read = frozenset(name for node in nodes for name in reads(node))
        return ((read & (scope.names | frozenset(scope.parameters)) & known) - bound) - scope.shared

    def _bind(self, names: Sequence[str], value: ast.expr, node: ast.stmt) -> ast.stmt:
        if not names:
            return at(ast.Expr(value), node)
        target = ast.Tuple([store(name) for name in names], ast.Store())
        return at(ast.Assign(targets=[target], value=value), node)

    def _note_missing(self, names: Sequence[str], scope: Scope, known: Names) -> None:
        scope.missing |= frozenset(names) - known

    def like(self, scope: Scope, known: Names) -> ast.expr:
        return tuple_of([name for name in scope.parameters if name in known])

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
        made = call(place.operators, "append", rewrite.visit(parts[0]), rewrite.visit(parts[1]), place.owner(name))
        return assign(name, made, node)

    def _set(self, node: ast.stmt, parts: list[ast.expr], scope: Scope, place: Place, rewrite: Expressions) -> ast.stmt:
        """`x[index] = value` for a tensor that is seen nowhere else."""
        assert isinstance(parts[0], ast.Name)
        name = parts[0].id
        site = self._site(node, "assignment", scope)
        value = rewrite.visit(parts[2])
        made = call(place.operators, "set", rewrite.visit(parts[0]), rewrite.index(parts[1]), value, site)
        made.args.insert(3, place.owner(name))
        return assign(name, made, node)

    def _augment(self, node: ast.AugAssign, scope: Scope, place: Place, rewrite: Expressions) -> list[ast.stmt]:
        operation = type(node.op).__name__
        if not isinstance(node.target, ast.Name):
            return [*self._target_effects(node.target, node, scope, place), rewrite.visit(node)]
        name = node.target.id
        if name in scope.outside or operation not in BINARY:
            return [*self._target_effects(node.target, node, scope, place), rewrite.visit(node)]
        is_real = name in scope.numbers and is_real_number(ast.BinOp(load(name), node.op, node.value), scope.numbers)
        made = call(
            place.operators,
            "augment",
            ast.Constant(operation),
            rewrite.real(load(name)) if is_real else rewrite.visit(load(name)),
            rewrite.visit(node.value),
            place.owner(name),
            ast.Constant(name in scope.fresh),
            self._site(node, "assignment", scope),
        )
        return [assign(name, made, node)]

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
                found.append(self._effect(place.owner(root_of(each)), node, scope, place))
        return found

    def _effects(self, value: ast.expr, scope: Scope, place: Place) -> list[ast.stmt]:
        """A guard before a call that changes what it is called on: `outs.append(y)`, `h.add_(1)`."""
        match value:
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                is_in_place = name.endswith("_") and not name.endswith("__")
                if name in MUTATORS or is_in_place:
                    return [self._effect(place.owner(root_of(owner)), value, scope, place)]
        return []

    def _effect(self, owner: ast.expr, node: ast.AST, scope: Scope, place: Place) -> ast.stmt:
        site = self._site(node, "a change", scope)
        return at(ast.Expr(call(place.operators, "effect", owner, site)), node)

    def _site(self, node: Any, kind: str, scope: Scope, *, is_plain_counter: bool = False) -> ast.expr:
        self.sites.append(Site(self.file, node.lineno, kind, scope.name, is_plain_counter=is_plain_counter))
        index = ast.Constant(len(self.sites) - 1)
        return ast.Subscript(load(SITES_NAME), index, ast.Load())

    def make_site(self, node: ast.AST, kind: str, scope: Scope) -> ast.expr:
        """For expressions: a site at `node`."""
        return self._site(node, kind, scope)
