"""A lowered syntax tree becomes one that calls the operators: a small function per branch, its variables in and out.

    if c: y = f(x)                   def _ds_then_1(_ds1, y): y = _ds1.call(f)(x); return (y,)
    else: y = y + 1        =>        def _ds_else_1(_ds1, y): y = y + 1; return (y,)
                                     (y,) = _ds0.cond(c, _ds_then_1, _ds_else_1, (y,), site)

Variables that a branch may write are parameters where it may read them first, and results where somebody reads them
afterwards (`variables`); those that it only reads are parameters, too. `_ds0`, `_ds1`, ... are the operators of each
level. Every generated node carries the line and column of the statement that it stands for, so that tracebacks and
debuggers show the user's own lines.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek.compiler.jit.rewriting.context import Context, Flow, Outside, Position, Scope
from deepseek.compiler.jit.rewriting.expressions import Expressions, rewrite_defaults
from deepseek.compiler.jit.rewriting.lowering import NOTHING, Fact, Facts, is_guard, is_python, lower
from deepseek.compiler.jit.rewriting.trees import (
    assign,
    assign_constant,
    at,
    attribute,
    call,
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
from deepseek.compiler.jit.rewriting.writes import (
    AUGMENT_ITEM,
    CHANGE,
    SET,
    is_plain_counter,
    is_special,
    name_writes,
    parameters_of,
)
from deepseek.compiler.jit.shared_names import BINARY, INTERNAL, ITEM_NAME

Loop = ast.While | ast.For
Native = ast.If | ast.With | ast.Try | ast.Match


def transform(
    tree: ast.FunctionDef, context: Context, name: str, level: int = 0, *, is_outermost: bool = True
) -> ast.FunctionDef:
    """Return the definition with operators `_ds{level}` in scope; only the outermost takes them as its first
    parameter."""
    body, facts = lower(name_writes(tree), f"{name} in {context.file}")
    scope = find_scope(tree, body)
    position = Position(context, scope, level, frozenset(scope.parameters), is_outermost)
    block = Statements(facts).block(body, Flow(NONE), position)
    start = [_undefined(missing, position, tree) for missing in sorted(scope.missing)]
    docstring = ast.get_docstring(tree, clean=False)
    head = [block.pop(0)] if docstring is not None and block and isinstance(block[0], ast.Expr) else []
    tree.body = [*head, *start, *block] or [ast.Pass()]
    return ast.fix_missing_locations(tree)


def find_scope(tree: ast.FunctionDef, body: list[ast.stmt]) -> Scope:
    """Return the variables of a function, by what may happen to them."""
    outside: dict[str, Outside] = {}
    for kind in (ast.Global, ast.Nonlocal):
        outside |= dict.fromkeys(declared(body, kind), kind)
    inner = [node for node in walk_scope(body) if isinstance(node, ast.FunctionDef)]
    moved = frozenset(name for function in inner for name in declared(function.body, ast.Nonlocal))
    names = writes(body) - frozenset(outside) - moved
    outside |= dict.fromkeys(moved & writes(body), ast.Nonlocal)
    shared = captured(body)
    deletes = [node.id for node in walk_scope(body) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del)]
    deleted = frozenset(deletes) - frozenset(outside) - shared
    return Scope(tree.name, parameters_of(tree), names, outside, shared, deleted=deleted)


@dataclass(frozen=True)
class Part:
    """The function of a branch or an iteration, with the variables that go in and out."""

    kind: str
    node: ast.stmt
    statements: list[ast.stmt]
    ins: Sequence[str]
    outs: Sequence[str] | None
    """The variables that it gives; none where it returns a result of its own."""
    bound: Names
    """The variables that it or its other branch writes."""
    read_after: Names


class Statements:
    """Transforms the statements of one function; `facts` are what lowering found out about them."""

    def __init__(self, facts: Facts) -> None:
        self.facts = dict(facts)

    def fact(self, node: ast.stmt) -> Fact:
        return self.facts.get(node, NOTHING)

    def block(self, statements: list[ast.stmt], flow: Flow, position: Position) -> list[ast.stmt]:
        """Return the statements transformed."""
        result: list[ast.stmt] = []
        scope = position.scope
        for index, statement in enumerate(statements):
            live = live_before(statements[index + 1 :], flow.after, flow.head, flow.end) | (scope.shared & scope.names)
            result.extend(self._statement(statement, Flow(live, flow.head, flow.end), position))
            position = position.knowing(surely_written([statement]))
        return result

    def _statement(  # noqa: PLR0911, PLR0912 - a table
        self, node: ast.stmt, flow: Flow, position: Position
    ) -> list[ast.stmt]:
        rewrite = Expressions(position)
        match node:
            case ast.If() if self.fact(node).stays_native or is_python(node.test):
                return self._native_if(node, flow, position)
            case ast.If() if is_guard(node):
                return [_guard(node, position)]
            case ast.If():
                return self._if(node, flow.after, position)
            case ast.While() | ast.For() if self.fact(node).stays_native:
                return self._native_loop(node, flow.after, position)
            case ast.While():
                return self._while(node, flow.after, position)
            case ast.For():
                return self._for(node, flow.after, position)
            case ast.With() | ast.Try() | ast.Match():
                return self._native(node, flow, position)
            case ast.FunctionDef():
                return _function(node, position)
            case ast.AsyncFunctionDef() | ast.ClassDef() | ast.Global() | ast.Nonlocal() | ast.Import():
                return [node]
            case ast.Assert():
                return [_assert(node, position)]
            case ast.Delete(targets=targets) if all(isinstance(target, ast.Name) for target in targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                return [part for name in names for part in _delete(name, position, node)]
            case ast.AugAssign():
                return [_augment(node, position)]
            case ast.Assign(value=ast.Call(func=ast.Name(id=name))) if name in (SET, CHANGE, AUGMENT_ITEM):
                return [_change(node, position)]
            case ast.Return(value=value) if value is not None and position.is_outermost and position.level == 0:
                return [at(ast.Return(call(position.operators, "give", rewrite.visit(value))), node)]
            case _:
                return [rewrite.visit(node)]

    # ---- statements that stay Python

    def _native_if(self, node: ast.If, flow: Flow, position: Position) -> list[ast.stmt]:
        rewrite = Expressions(position)
        is_checked = not is_python(node.test)
        site = position.site(node, "a condition")
        node.test = rewrite.visit(node.test) if is_checked else rewrite.condition(node.test)
        if is_checked:
            node.test = at(call(position.operators, "test", node.test, site), node.test)
        return self._native(node, flow, position)

    def _native(self, node: Native, flow: Flow, position: Position) -> list[ast.stmt]:
        """Return a statement that stays Python, with what is inside transformed."""
        items = node.items if isinstance(node, ast.With) else []
        for item in items:
            item.context_expr = Expressions(position).visit(item.context_expr)
        if isinstance(node, ast.Match):
            subject = Expressions(position).visit(node.subject)
            node.subject = at(call(position.operators, "subject", subject, position.site(node, "a match")), node)
        if isinstance(node, (ast.Try, ast.Match)):
            flow = Flow(flow.after | reads(node), flow.head, flow.end)
        inside = position.knowing(frozenset(name for item in items for name in writes(item)))
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if block:
                setattr(node, name, self.block(block, flow, inside))
        for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
            part.body = self.block(part.body, flow, position)
        return [node]

    def _native_loop(self, node: Loop, after: Names, position: Position) -> list[ast.stmt]:
        rewrite = Expressions(position)
        live = live_before([node], after)
        site = position.site(node, "a loop")
        orelse = live_before(node.orelse, after)
        inside = position
        if isinstance(node, ast.While):
            test = rewrite.condition(node.test)
            node.test = at(call(position.operators, "test", test, site), test)
        else:
            node.iter = at(call(position.operators, "iterate", rewrite.visit(node.iter), site), node.iter)
            inside = position.knowing(writes(node.target))
        node.body = self.block(node.body, Flow(live | orelse | after, live | orelse, after), inside)
        node.orelse = self.block(node.orelse, Flow(after), inside)
        return [node]

    # ---- choosing and looping

    def _if(self, node: ast.If, after: Names, position: Position) -> list[ast.stmt]:
        gives_result = self.fact(node).gives_result
        test = Expressions(position).condition(node.test)
        position = position.knowing(writes(node.test))
        bound = _bound_in([*node.body, *node.orelse], position.scope)
        outs = None if gives_result else sorted(bound & after)
        flowing = frozenset(outs or ())
        needed = live_before(node.body, flowing) | live_before(node.orelse, flowing)
        needed |= flowing - (surely_written(node.body) & surely_written(node.orelse))
        ins = sorted((bound & needed) | position.read_only([*node.body, *node.orelse], bound))
        _note_missing(ins, position)
        then = self._part(Part("then", node, node.body, ins, outs, bound, flowing), position)
        other = self._part(Part("else", node, node.orelse, ins, outs, bound, flowing), position)
        site = position.site(node, "if", names=None if outs is None else tuple(outs))
        made = call(position.operators, "cond", test, load(then.name), load(other.name), tuple_of(ins), site)
        if outs is not None:
            return [then, other, _bind(outs, made, node)]
        if position.is_outermost and position.level == 0:
            made = call(position.operators, "give", made)
        return [then, other, at(ast.Return(made), node)]

    def _while(self, node: ast.While, after: Names, position: Position) -> list[ast.stmt]:
        if any(isinstance(inner, ast.NamedExpr) for inner in ast.walk(node.test)):
            return self._while_with_walrus(node, after, position)
        stop = self.fact(node).stop
        bound = _bound_in(node.body, position.scope)
        head = live_before([node], after)
        carried = sorted(bound & (head | after) | ({stop} if stop else NONE))
        _note_missing(carried, position)
        test = _define("test", node, carried, position)
        condition = Expressions(position.deeper()).condition(node.test)
        test.body = [at(ast.Return(condition), node.test)]
        read_after = head | after | (frozenset({stop}) if stop else NONE)
        extras = sorted(position.read_only(node.body, bound))
        part = Part("iteration", node, node.body, [*carried, *extras], carried, bound, read_after)
        body = self._part(part, position)
        site = position.site(node, "while", names=tuple(carried), stop=carried.index(stop) if stop else None)
        made = call(
            position.operators, "while_", load(test.name), load(body.name), tuple_of(carried), tuple_of(extras), site
        )
        return [test, body, _bind(carried, made, node)]

    def _while_with_walrus(self, node: ast.While, after: Names, position: Position) -> list[ast.stmt]:
        """`while (n := f()) > 0` as an endless loop whose first statement leaves it."""
        stop = self.fact(node).stop or f"{INTERNAL}stop_{node.lineno}_{node.col_offset}"
        inside = ast.If(test=node.test, body=node.body, orelse=[at(assign_constant(stop, True), node)])
        node.test = at(ast.Constant(True), node.test)
        node.body = [at(inside, node)]
        self.facts[node] = Fact(stop=stop)
        position.scope.names |= {stop}
        start = at(assign_constant(stop, False), node)
        return [start, *self._while(node, after, position.knowing(frozenset({stop})))]

    def _for(self, node: ast.For, after: Names, position: Position) -> list[ast.stmt]:
        stop = self.fact(node).stop
        items = Expressions(position).visit(node.iter)
        scope = position.scope
        bound = (writes(node.body) | writes(node.target)) & scope.locals - scope.shared
        head = live_before([node], after)
        carried = sorted(bound & (head | after) | ({stop} if stop else NONE))
        _note_missing(carried, position)
        take = at(ast.Assign(targets=[node.target], value=load(ITEM_NAME)), node.target)
        read_after = head | after | (frozenset({stop}) if stop else NONE)
        extras = sorted(position.read_only(node.body, bound))
        statements = [take, *node.body]
        part = Part("iteration", node, statements, [*carried, *extras], carried, bound, read_after)
        body = self._part(part, position)
        body.args.args.insert(1, ast.arg(arg=ITEM_NAME))
        site = position.site(
            node,
            "for",
            names=tuple(carried),
            stop=carried.index(stop) if stop else None,
            is_plain_counter=is_plain_counter(node),
        )
        made = call(position.operators, "for_", items, load(body.name), tuple_of(carried), tuple_of(extras), site)
        return [body, _bind(carried, made, node)]

    def _part(self, part: Part, position: Position) -> ast.FunctionDef:
        """Return the function of one branch or iteration."""
        function = _define(part.kind, part.node, part.ins, position)
        function.body = _declare_outside(part.statements, position.scope)
        known = position.known - (part.bound - frozenset(part.ins))  # what is written first in here has no value before
        function.body += self.block(part.statements, Flow(part.read_after), position.deeper(known))
        if part.outs is not None:
            function.body.append(at(ast.Return(tuple_of(part.outs)), part.node))
        function.body = function.body or [at(ast.Pass(), part.node)]
        return function


# ---- checks, definitions, changes


def _assert(node: ast.Assert, position: Position) -> ast.stmt:
    rewrite = Expressions(position)
    site = position.site(node, "assert")
    message = ast.Constant(None) if node.msg is None else thunk(rewrite.visit(node.msg))
    return at(ast.Expr(call(position.operators, "assert_", rewrite.condition(node.test), message, site)), node)


def _guard(node: ast.If, position: Position) -> ast.stmt:
    rewrite = Expressions(position)
    error = node.body[0]
    assert isinstance(error, ast.Raise)
    assert error.exc is not None
    if error.cause is not None:
        node.test = rewrite.condition(node.test)
        return node
    site = position.site(node, "raise")
    test = rewrite.condition(node.test)
    return at(ast.Expr(call(position.operators, "raise_if", test, thunk(rewrite.visit(error.exc)), site)), node)


def _function(node: ast.FunctionDef, position: Position) -> list[ast.stmt]:
    rewrite_defaults(node.args, Expressions(position))
    if is_special(node):
        return [node]
    name = f"{position.scope.name}.{node.name}"
    changed = transform(node, position.context, name, position.level, is_outermost=False)
    if node.decorator_list:
        return [changed]
    return [changed, assign(node.name, call(position.operators, "mark", load(node.name)), node)]


def _change(node: ast.Assign, position: Position) -> ast.stmt:
    """`x[index] = value` or `x.append(value)`, as an assignment of `x`."""
    assert isinstance(node.value, ast.Call)
    rewrite = Expressions(position)
    variable, indices, *values = node.value.args
    assert isinstance(indices, ast.Tuple)
    path = ast.Tuple([rewrite.index(index) for index in indices.elts], ast.Load())
    assert isinstance(node.value.func, ast.Name)
    assert isinstance(variable, ast.Name)
    site = position.site(node, "assignment")
    operators, name, now = position.operators, ast.Constant(variable.id), rewrite.visit(variable)
    if node.value.func.id == SET:
        return assign(variable.id, call(operators, "set", now, path, rewrite.visit(values[0]), name, site), node)
    part, *values = values
    if node.value.func.id == AUGMENT_ITEM:
        new = rewrite.visit(values[0])
        return assign(variable.id, call(operators, "augment_item", part, now, path, new, name, site), node)
    made = call(operators, "change", now, path, part, name, site, *(rewrite.visit(value) for value in values))
    made.keywords = [rewrite.visit(keyword) for keyword in node.value.keywords]
    return assign(variable.id, made, node)


def _augment(node: ast.AugAssign, position: Position) -> ast.stmt:
    rewrite = Expressions(position)
    operation, scope = type(node.op).__name__, position.scope
    if not isinstance(node.target, ast.Name) or node.target.id in scope.outside or operation not in BINARY:
        return rewrite.visit(node)  # type: ignore[no-any-return]
    name = node.target.id
    made = call(
        position.operators,
        "augment",
        ast.Constant(operation),
        rewrite.visit(load(name)),
        rewrite.visit(node.value),
        ast.Constant(name),
        position.site(node, "assignment"),
    )
    return assign(name, made, node)


def _delete(name: str, position: Position, where: ast.Delete) -> list[ast.stmt]:
    """Give `del name`: Python's own for what lives elsewhere; a local variable must have a value, and has none then."""
    if name not in position.scope.deleted:
        return [at(ast.Delete(targets=[ast.Name(name, ast.Del())]), where)]
    look = ast.Expr(Expressions(position).visit(load(name)))
    return [at(look, where), _undefined(name, position, where)]


def _undefined(name: str, position: Position, where: ast.AST) -> ast.stmt:
    return assign(name, attribute(position.operators, "undefined"), where)


# ---- parts


def _bound_in(statements: list[ast.stmt], scope: Scope) -> Names:
    """Return the local variables that statements write."""
    return writes(statements) & scope.locals - scope.shared


def _define(kind: str, node: ast.stmt, names: Sequence[str], position: Position) -> ast.FunctionDef:
    """Return an empty function for a part of the user's function, one level deeper."""
    position.scope.num_parts += 1
    arguments = ast.arguments(
        posonlyargs=[],
        args=[ast.arg(arg=name) for name in (position.deeper().operators, *names)],
        kwonlyargs=[],
        kw_defaults=[],
        defaults=[],
    )
    return ast.copy_location(function_of(f"{INTERNAL}{kind}_{position.scope.num_parts}", arguments, []), node)


def _declare_outside(statements: list[ast.stmt], scope: Scope) -> list[ast.stmt]:
    written = writes(statements)
    lines: list[ast.stmt] = []
    for kind in (ast.Global, ast.Nonlocal):
        names = sorted(name for name in written if scope.outside.get(name) is kind)
        if kind is ast.Nonlocal:
            shared = written & scope.shared & scope.locals
            scope.missing |= shared - frozenset(scope.parameters)  # nothing else may give it a place in the function
            names = sorted({*names, *shared})
        if names:
            lines.append(at(kind(names=names), statements[0]))
    return lines


def _bind(names: Sequence[str], value: ast.expr, node: ast.stmt) -> ast.stmt:
    if not names:
        return at(ast.Expr(value), node)
    target = ast.Tuple([store(name) for name in names], ast.Store())
    return at(ast.Assign(targets=[target], value=value), node)


def _note_missing(names: Sequence[str], position: Position) -> None:
    position.scope.missing |= frozenset(names) - position.known
