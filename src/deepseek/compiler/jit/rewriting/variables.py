"""Which variables a piece of a function reads, writes, needs, and surely has: the classic analyses on structured code.

`reads` and `writes` look at trees; `live_before` says which variables a list of statements may read before it writes
them, given what is read afterwards; `surely_written` which it writes on every way through. A nested function's free
variables count as read where it is defined. What is not understood (`try`, `match`) is answered on the safe side:
more is live. Source: Aho, Lam, Sethi, Ullman, Compilers (2006), section 9.2.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

Names = frozenset[str]
NONE: Names = frozenset()
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def reads(node: ast.AST | None) -> Names:
    """Return the names that `node` loads, those inside nested functions and comprehensions included."""
    if node is None:
        return NONE
    return frozenset(
        name.id for name in ast.walk(node) if isinstance(name, ast.Name) and not isinstance(name.ctx, ast.Store)
    )


def writes(nodes: ast.AST | Iterable[ast.AST]) -> Names:
    """Return the names that `nodes` bind in their own scope."""
    found: set[str] = set()
    for node in walk_scope(nodes):
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            found.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            found.add(node.rest)
    return frozenset(found)


def walk_scope(nodes: ast.AST | Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes below `nodes` that belong to the same scope; a nested function itself is one, its inside is not.

    A comprehension is a scope of its own, but a name that `:=` binds in it belongs to the function.
    """
    stack = [nodes] if isinstance(nodes, ast.AST) else list(nodes)
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, COMPREHENSIONS):
            stack.extend(inner for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr))
        elif not isinstance(node, SCOPES):
            stack.extend(ast.iter_child_nodes(node))


def captured(nodes: ast.AST | Iterable[ast.AST]) -> Names:
    """Return the names that functions defined among `nodes` read from around them."""
    found: set[str] = set()
    for node in walk_scope(nodes):
        if isinstance(node, ast.Lambda):
            found |= (_own_reads(node.body) | captured(node.body)) - _parameters(node.args)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = (writes(node.body) | _parameters(node.args)) - declared(node.body, ast.Nonlocal)
            found |= (_own_reads(node.body) | captured(node.body)) - own
        elif isinstance(node, ast.ClassDef):
            found |= reads(node)
    return frozenset(found)


def _own_reads(nodes: ast.AST | Iterable[ast.AST]) -> Names:
    """Return the names that `nodes` load outside of nested functions, but for what is computed where those are
    defined."""
    found: set[str] = set()
    for node in walk_scope(nodes):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            outer = [*node.args.defaults, *node.args.kw_defaults, *getattr(node, "decorator_list", [])]
            found |= frozenset(name for part in outer for name in reads(part))
        elif isinstance(node, (ast.Name, *COMPREHENSIONS)):
            found |= reads(node)
    return frozenset(found)


def _parameters(arguments: ast.arguments) -> Names:
    return frozenset(node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg))


def declared(nodes: Iterable[ast.AST], kind: type[ast.Global] | type[ast.Nonlocal]) -> Names:
    """Return the names that a `global` or `nonlocal` statement of this scope declares."""
    return frozenset(name for node in walk_scope(nodes) if isinstance(node, kind) for name in node.names)


def live_before(statements: list[ast.stmt], after: Names, head: Names = NONE, end: Names = NONE) -> Names:
    """Return the names that may be read before they are written, from the start of `statements` on; `after` is read
    afterwards.

    `head` and `end` are what is read after a native `continue` and `break`.
    """
    for statement in reversed(statements):
        after = _live_before_one(statement, after, head, end)
    return after


def _live_before_one(statement: ast.stmt, after: Names, head: Names, end: Names) -> Names:  # noqa: PLR0911 - a table
    match statement:
        case ast.Return() | ast.Raise():
            return reads(statement)
        case ast.Break():
            return end
        case ast.Continue():
            return head
        case ast.If(test=test, body=body, orelse=orelse):
            either = live_before(body, after, head, end) | live_before(orelse, after, head, end)
            return reads(test) | (either - writes(test))
        case ast.While(test=test, body=body, orelse=orelse):
            return _live_before_loop(reads(test), NONE, body, live_before(orelse, after, head, end), after)
        case ast.For(target=target, iter=items, body=body, orelse=orelse):
            leaving = live_before(orelse, after, head, end)
            return reads(items) | _live_before_loop(reads(target), writes(target), body, leaving, after)
        case ast.With(items=items, body=body):
            bound = frozenset(name for item in items for name in writes(item))
            inside = live_before(body, after, head, end)
            return frozenset(name for item in items for name in reads(item)) | (inside - bound)
        case ast.Try() | ast.Match():
            return reads(statement) | after
        case ast.Assign() | ast.AnnAssign():
            return reads(statement) | (after - _bound_names(statement))
        case ast.AugAssign(target=target):
            return reads(statement) | writes(target) | after
        case ast.FunctionDef() | ast.ClassDef():
            return reads(statement) | (after - {statement.name})
        case _:
            return reads(statement) | (after - writes(statement))


def _bound_names(statement: ast.Assign | ast.AnnAssign) -> Names:
    if isinstance(statement, ast.AnnAssign):
        return writes(statement.target) if statement.value is not None else NONE
    return writes(statement)


def _live_before_loop(head_reads: Names, bound: Names, body: list[ast.stmt], leaving: Names, end: Names) -> Names:
    live = head_reads | leaving
    while True:
        again = live | (live_before(body, live, live, end) - bound)
        if again == live:
            return live
        live = again


def surely_written(statements: list[ast.stmt]) -> Names:
    """Return the names that are bound on every way through `statements` to their end."""
    found: set[str] = set()
    for statement in statements:
        match statement:
            case ast.If(test=test, body=body, orelse=orelse):
                found |= writes(test) | _common(body, orelse)
            case ast.With(items=items, body=body):
                found |= surely_written(body) | frozenset(name for item in items for name in writes(item))
            case ast.While() | ast.For() | ast.Try() | ast.Match() | ast.Delete():
                pass
            case ast.AnnAssign(value=None):
                pass
            case _:
                found |= writes(statement)
    return frozenset(found)


def _common(body: list[ast.stmt], orelse: list[ast.stmt]) -> Names:
    if never_ends(body):
        return surely_written(orelse)
    if never_ends(orelse):
        return surely_written(body)
    return surely_written(body) & surely_written(orelse)


def never_ends(statements: list[ast.stmt]) -> bool:
    """Return whether the end of `statements` cannot be reached."""
    for statement in statements:
        if isinstance(statement, (ast.Return, ast.Raise, ast.Break, ast.Continue)):
            return True
        if isinstance(statement, ast.If) and never_ends(statement.body) and never_ends(statement.orelse):
            return True
        if isinstance(statement, ast.With) and never_ends(statement.body):
            return True
    return False
