"""Jumps become structure: after this, a branch that may depend on a tensor ends at its end and nowhere else.

    if c: return a        if c: return a          while t:            stop = False
    rest             =>   else: rest                  if c: break =>  while not stop and t:
                                                      rest                if c: stop = True
                                                                          else: rest

What follows an `if` that may leave the block moves into the branches that do not leave (both, where both may go on).
A `return` inside a loop sets a flag and a value and ends the loop; after the loop the flag is looked at. A statement
whose condition is a Python value for certain (`x is None`, `isinstance(...)`, `self.training`) keeps its jumps, and so
does everything inside `try`, `match` and nested functions. Every `if` that stays in tail position with returns inside
gives the function's result. What is found out about statements is kept beside the tree, as a `Fact` for each.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deepseek.compiler.jit.rewriting.variables import SCOPES, never_ends
from deepseek.compiler.jit.shared_names import INTERNAL, RESULT_NAME, UNDEFINED_NAME
from deepseek.core.errors import ConfigError

MAX_COPIES = 256
RETURNED = f"{INTERNAL}returned"
PYTHON_CALLS = {"isinstance", "hasattr", "callable", "issubclass", "len", "torch.is_grad_enabled", "torch.is_tensor"}
PYTHON_ITERABLES = {"enumerate", "zip", "reversed", "sorted", "map", "filter"}


@dataclass(frozen=True)
class Fact:
    """A finding of the lowering about a statement."""

    stays_native: bool = False
    """Whether it stays Python, its jumps included."""
    gives_result: bool = False
    """Whether it is an `if` in tail position whose branches give the function's result."""
    stop: str | None = None
    """The flag that ends a loop."""


NOTHING = Fact()
Facts = Mapping[ast.stmt, Fact]


@dataclass
class Lowering:
    """The state of one function's lowering: flags in use, how often a rest was copied, facts about statements."""

    where: str
    flags: list[str] = field(default_factory=list)
    num_copies: int = 0
    facts: dict[ast.stmt, Fact] = field(default_factory=dict)

    def of(self, statement: ast.stmt) -> Fact:
        return self.facts.get(statement, NOTHING)

    def keep_native(self, statement: ast.stmt) -> None:
        self.facts[statement] = replace(self.of(statement), stays_native=True)

    def make_flag(self, name: str) -> str:
        flag = f"{INTERNAL}{name}_{len(self.flags)}"
        self.flags.append(flag)
        return flag


@dataclass(frozen=True)
class EnclosingLoop:
    """The loop whose body is being lowered, and its break flag."""

    stop: str


def lower(statements: list[ast.stmt], where: str) -> tuple[list[ast.stmt], Facts]:
    """Give the statements of a function without jumps out of what may depend on a tensor, and facts about them."""
    state = Lowering(where)
    return _lower_block(statements, None, state), state.facts


def is_python(test: ast.expr) -> bool:  # noqa: PLR0911 - a table
    """Return whether a condition is a Python value for certain, whatever its variables hold."""
    match test:
        case ast.Constant():
            return True
        case ast.Compare(comparators=[ast.Constant(value=bool())]):
            return False  # `is True` asks for the truth of what may be a number of the graph
        case ast.Compare(ops=ops):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in ops) or any(
                isinstance(right, ast.Constant) and isinstance(right.value, str) for right in test.comparators
            )
        case ast.Call(func=function):
            return ast.unparse(function) in PYTHON_CALLS
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return is_python(operand)
        case ast.BoolOp(values=values):
            return all(is_python(value) for value in values)
        case ast.Attribute(attr="training" | "requires_grad" | "is_cuda"):
            return True
        case _:
            return False


def is_python_iterable(items: ast.expr) -> bool:
    """Return whether what a `for` walks over is not a tensor and not a range of tensors for certain."""
    match items:
        case ast.Tuple() | ast.List() | ast.Dict() | ast.Set():
            return True
        case ast.Call(func=ast.Name(id="range"), args=args):
            return all(_is_python_number(arg) for arg in args)
        case ast.Call(func=ast.Name(id=name)):
            return name in PYTHON_ITERABLES
        case ast.Call(func=ast.Attribute(attr="items" | "keys" | "values")):
            return True
        case _:
            return False


def _is_python_number(node: ast.expr) -> bool:
    match node:
        case ast.Constant():
            return True
        case ast.Call(func=ast.Name(id="len")) | ast.Call(func=ast.Attribute(attr="size" | "dim")):
            return True
        case ast.Subscript(value=ast.Attribute(attr="shape")):
            return True
        case ast.BinOp(left=left, right=right):
            return _is_python_number(left) and _is_python_number(right)
        case _:
            return False


def has_jump(statements: list[ast.stmt], *, inside_loop: bool = False) -> bool:
    """Return whether a `return`, or a `break` or `continue` of the loop around, is among the statements."""
    for statement in statements:
        if isinstance(statement, ast.Return):
            return True
        if isinstance(statement, (ast.Break, ast.Continue)) and not inside_loop:
            return True
        if isinstance(statement, SCOPES):
            continue
        nested = inside_loop or isinstance(statement, (ast.While, ast.For))
        for name in ("body", "orelse", "finalbody"):
            if has_jump(getattr(statement, name, []), inside_loop=nested if name == "body" else inside_loop):
                return True
        if any(has_jump(handler.body, inside_loop=inside_loop) for handler in getattr(statement, "handlers", [])):
            return True
        if any(has_jump(case.body, inside_loop=inside_loop) for case in getattr(statement, "cases", [])):
            return True
    return False


def has_return(statements: list[ast.stmt]) -> bool:
    """Return whether a `return` of this function is among the statements."""
    return has_jump(statements, inside_loop=True)


def may_jump_on_tensor(statements: list[ast.stmt]) -> bool:
    """Return whether among the statements a condition that may be a tensor decides about a jump out of them."""
    return any(_decides_a_jump(statement) for statement in statements)


def _decides_a_jump(statement: ast.stmt) -> bool:
    match statement:
        case ast.If(test=test, body=body, orelse=orelse):
            if not has_jump([statement]):
                return False
            return not is_python(test) or may_jump_on_tensor(body) or may_jump_on_tensor(orelse)
        case ast.While() | ast.For():
            return has_return(statement.body) or may_jump_on_tensor(statement.orelse)
        case ast.With(body=body):
            return may_jump_on_tensor(body)
        case _:
            return False


def stays_native(loop: ast.While | ast.For) -> bool:
    """Return whether a loop is Python for certain, its exits included, or has exits that no graph loop can have."""
    if _has_hidden_exit(loop.body):
        return True
    fixed = is_python(loop.test) if isinstance(loop, ast.While) else is_python_iterable(loop.iter)
    return fixed and not may_jump_on_tensor(loop.body) and not has_return(loop.body)


def _has_hidden_exit(statements: list[ast.stmt]) -> bool:
    """Return whether a jump out of the loop stands inside `try`, `match` or `with`."""
    for statement in statements:
        if isinstance(statement, (ast.Try, ast.Match, ast.With)) and has_jump([statement]):
            return True
        is_loop = isinstance(statement, (ast.While, ast.For))
        if is_loop and any(_has_hidden_exit(block) and has_return(block) for block in blocks_of(statement)):
            return True
        if isinstance(statement, ast.If) and (_has_hidden_exit(statement.body) or _has_hidden_exit(statement.orelse)):
            return True
    return False


# ---- blocks


def _lower_block(  # noqa: PLR0911 - a table
    statements: list[ast.stmt], loop: EnclosingLoop | None, state: Lowering
) -> list[ast.stmt]:
    lowered: list[ast.stmt] = []
    for index, statement in enumerate(statements):
        rest = statements[index + 1 :]
        if isinstance(statement, ast.If):
            statement = _put_raise_first(statement)  # noqa: PLW2901 - the same statement, inverted
        match statement:
            case ast.Return() | ast.Break() | ast.Continue() if loop is not None:
                return lowered + _end(statement, loop)
            case ast.Return() | ast.Raise():
                return [*lowered, statement]
            case ast.If() if is_guard(statement):
                guard = _if(statement.test, statement.body, statement)
                return [*lowered, guard, *_lower_block(statement.orelse + rest, loop, state)]
            case ast.If() if _must_take_rest(statement, loop):
                return lowered + _lower_jump(statement, rest, loop, state)
            case ast.While() | ast.For():
                return lowered + _lower_loop(statement, rest, loop, state)
            case ast.With(body=body) if may_jump_on_tensor(body):
                return lowered + _lower_with(statement, rest, state)
            case ast.If() | ast.With():
                _lower_parts(statement, loop, state)
            case ast.Try() | ast.Match():
                _lower_native([statement], state)
        lowered.append(statement)
    return lowered


def _lower_parts(statement: ast.If | ast.With, loop: EnclosingLoop | None, state: Lowering) -> None:
    statement.body = _lower_block(statement.body, loop, state)
    if isinstance(statement, ast.If):
        statement.orelse = _lower_block(statement.orelse, loop, state)


def is_guard(statement: ast.If) -> bool:
    """Return whether it begins with `if condition: raise error`, which a graph can check when it runs."""
    match statement.body:
        case [ast.Raise(exc=error)]:
            return error is not None
        case _:
            return False


def _put_raise_first(statement: ast.If) -> ast.If:
    """`if c: ... else: raise error` the other way round, as a guard."""
    match statement.orelse:
        case [ast.Raise(exc=error)] if error is not None and not is_guard(statement):
            test = ast.copy_location(ast.UnaryOp(ast.Not(), statement.test), statement.test)
            inverted = _if(test, statement.orelse, statement)
            inverted.orelse = statement.body
            return inverted
        case _:
            return statement


def _must_take_rest(statement: ast.If, loop: EnclosingLoop | None) -> bool:
    if not has_jump([statement]):
        return False
    return loop is not None or may_jump_on_tensor([statement])


def _end(statement: ast.stmt, loop: EnclosingLoop) -> list[ast.stmt]:
    """Return the assignments of flags that replace a jump in a loop's body."""
    if isinstance(statement, ast.Continue):
        return []
    ends: list[ast.stmt] = [_assign(loop.stop, ast.Constant(True), statement)]
    if isinstance(statement, ast.Return):
        ends.append(_assign(RETURNED, ast.Constant(True), statement))
        ends.append(_assign(RESULT_NAME, statement.value or ast.Constant(None), statement))
    return ends


def _lower_jump(statement: ast.If, rest: list[ast.stmt], loop: EnclosingLoop | None, state: Lowering) -> list[ast.stmt]:
    """An `if` whose branches may leave: what follows goes into those that do not."""
    body = statement.body if never_ends(statement.body) else statement.body + rest
    copied = rest
    if not never_ends(statement.body) and not never_ends(statement.orelse) and rest:
        state.num_copies += 1
        if state.num_copies > MAX_COPIES:
            raise ConfigError(f"{state.where} has too many early exits to follow them all; split it into functions")
        copied = [copy.deepcopy(following) for following in rest]
    orelse = statement.orelse if never_ends(statement.orelse) else statement.orelse + copied
    statement.body = _lower_block(body, loop, state) or [_pass(statement)]
    statement.orelse = _lower_block(orelse, loop, state)
    if loop is None:
        _finish(statement.body, state)
        _finish(statement.orelse, state)
        state.facts[statement] = Fact(gives_result=True)
    return [statement]


def _finish(block: list[ast.stmt], state: Lowering) -> None:
    """A block in tail position that runs to its end returns None."""
    if not never_ends(block) and not (block and state.of(block[-1]).gives_result):
        last = block[-1] if block else None
        value = ast.Return(value=ast.Constant(None))
        block.append(ast.copy_location(value, last) if last is not None else value)


def _lower_loop(
    statement: ast.While | ast.For, rest: list[ast.stmt], loop: EnclosingLoop | None, state: Lowering
) -> list[ast.stmt]:
    if stays_native(statement):
        state.keep_native(statement)
        statement.body = _lower_native(statement.body, state)
        statement.orelse = _lower_native(statement.orelse, state)
        return [statement, *_lower_block(rest, loop, state)]
    stop = state.make_flag("stop")
    returns = has_return(statement.body)
    leaves = _has_break(statement.body)
    breaks = leaves or returns
    statement.body = _lower_block(statement.body, EnclosingLoop(stop), state) or [_pass(statement)]
    state.facts[statement] = Fact(stop=stop if breaks else None)
    before: list[ast.stmt] = [_assign(stop, ast.Constant(False), statement)] if breaks else []
    if returns and loop is None:
        before.append(_assign(RETURNED, ast.Constant(False), statement))
        before.append(_assign(RESULT_NAME, ast.Name(UNDEFINED_NAME, ast.Load()), statement))
    after = list(rest)
    if statement.orelse and breaks:
        after.insert(0, _if(ast.UnaryOp(ast.Not(), _name(stop)), statement.orelse, statement))
    elif statement.orelse:
        after = statement.orelse + after
    statement.orelse = []
    if returns and _is_endless(statement) and not leaves:
        after = _leave(statement, loop)
    elif returns:
        after.insert(0, _if(_name(RETURNED), _leave(statement, loop), statement))
    return [*before, statement, *_lower_block(after, loop, state)]


def _lower_native(statements: list[ast.stmt], state: Lowering) -> list[ast.stmt]:
    """Lower what is inside statements that stay Python, where it has no jumps of theirs."""
    lowered: list[ast.stmt] = []
    for statement in statements:
        is_open = has_jump([statement]) and not isinstance(statement, (ast.While, ast.For))
        if is_open or isinstance(statement, (ast.Try, ast.Match)):
            state.keep_native(statement)
            for block in blocks_of(statement):
                block[:] = _lower_native(block, state)
            lowered.append(statement)
        elif isinstance(statement, (ast.While, ast.For)) and has_return(statement.body):
            state.keep_native(statement)
            statement.body = _lower_native(statement.body, state)
            lowered.append(statement)
        else:
            lowered.extend(_lower_block([statement], None, state))
    return lowered


def blocks_of(statement: ast.stmt) -> list[list[ast.stmt]]:
    """Return the lists of statements inside a statement."""
    blocks = [getattr(statement, name) for name in ("body", "orelse", "finalbody") if getattr(statement, name, None)]
    blocks.extend(handler.body for handler in getattr(statement, "handlers", []))
    blocks.extend(case.body for case in getattr(statement, "cases", []))
    return blocks


def _is_endless(statement: ast.While | ast.For) -> bool:
    """Return whether a loop ends by its jumps only."""
    return isinstance(statement, ast.While) and isinstance(statement.test, ast.Constant) and bool(statement.test.value)


def _leave(statement: ast.stmt, loop: EnclosingLoop | None) -> list[ast.stmt]:
    """After a loop in which the function returned: return its result, or leave the loop around, too."""
    if loop is None:
        return [ast.copy_location(ast.Return(value=_name(RESULT_NAME)), statement)]
    return [ast.copy_location(ast.Break(), statement)]


def _lower_with(statement: ast.With, rest: list[ast.stmt], state: Lowering) -> list[ast.stmt]:
    """A `with` that may be left early by a return: its body becomes a loop of one iteration."""
    if not rest:
        statement.body = _lower_block(statement.body, None, state)
        _finish(statement.body, state)
        return [statement]
    once = ast.For(
        target=ast.Name(state.make_flag("once"), ast.Store()),
        iter=ast.Tuple([ast.Constant(0)], ast.Load()),
        body=statement.body,
        orelse=[],
    )
    ast.fix_missing_locations(ast.copy_location(once, statement))
    lowered = _lower_loop(once, [], None, state)
    statement.body = lowered[: lowered.index(once) + 1]
    return [statement, *_lower_block([_if(_name(RETURNED), _leave(statement, None), statement), *rest], None, state)]


def _has_break(statements: list[ast.stmt]) -> bool:
    for statement in statements:
        if isinstance(statement, ast.Break):
            return True
        if isinstance(statement, (*SCOPES, ast.While, ast.For)):
            if has_jump(getattr(statement, "orelse", [])):
                return True
            continue
        if any(_has_break(getattr(statement, name, [])) for name in ("body", "orelse", "finalbody")):
            return True
    return False


# ---- small trees


def _name(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _assign(name: str, value: ast.expr, at: ast.stmt) -> ast.stmt:
    node = ast.Assign(targets=[ast.Name(name, ast.Store())], value=value)
    return ast.fix_missing_locations(ast.copy_location(node, at))


def _if(test: ast.expr, body: list[ast.stmt], at: ast.stmt) -> ast.If:
    node = ast.If(test=test, body=body, orelse=[])
    return ast.fix_missing_locations(ast.copy_location(node, at))


def _pass(at: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Pass(), at)
