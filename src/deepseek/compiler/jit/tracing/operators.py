"""What rewritten code calls: each operator decides, when it is reached, whether it is Python or a part of the graph.

A condition that is a Python value stays Python: the taken branch runs, the other is not even looked at. A condition
that is a tensor outside of any trace is Python, too (`bool` of it). Only a tensor condition inside a trace becomes
`torch.cond` or `while_loop`. To know what both branches give, each is first run once only to look ("probing"); those
operators are dead and `cleaning.erase_probes` takes them out of the graph, so that a graph computes each branch once.

Rewritten code receives an `Operators` value and hands a deeper one to the branches: `depth` says how many tensor
conditions surround the code, so that a change of something outside of a branch is noticed, and `is_probing` keeps
nested probes from building graphs of their own.
"""

from __future__ import annotations

import builtins
import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compiler.jit.tracing.calls import Rewritable, call_with_hooks, find_forward, find_twin, is_library
from deepseek.compiler.jit.tracing.gradients import all_require_grad, choose, copy_all, loop, steady, unalias
from deepseek.compiler.jit.tracing.indexing import as_indices, is_index, is_plain_index
from deepseek.compiler.jit.tracing.merging import (
    INTERNAL,
    UNDEFINED,
    Form,
    choose_float,
    describe,
    flatten,
    has_leaves,
    is_number,
    is_traced,
    leaves_of,
    rebuild,
)
from deepseek.compiler.jit.tracing.probing import merge_all, run_probe, settle
from deepseek.compiler.jit.tracing.sites import Site, enter, note, refuse

HINT = "move the condition out of it, or compute both sides and choose with torch.where"
HINTS = {
    "a comprehension": "write it as a loop, or choose with torch.where",
    "try": "move the condition out of the try block",
    "a condition with :=": "assign to the variable in a statement of its own before the condition",
}
NUMBERS: dict[str, Any] = {"int": int, "float": float, "bool": bool}
DEPTHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OUTSIDE = DEPTHS[0]
MAX_DEPTH = len(DEPTHS) - 1  # tensor conditions inside one another
UNROLLED_TURNS = 8  # a counted loop with a tensor-valued exit is unrolled up to here and becomes a graph loop beyond
UNROLLED_ROWS = 16  # a loop over a tensor's rows is unrolled up to here
COMPARISONS = {
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Eq": operator.eq,
    "NotEq": operator.ne,
}
BINARY: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "Add": (operator.add, operator.iadd),
    "Sub": (operator.sub, operator.isub),
    "Mult": (operator.mul, operator.imul),
    "Div": (operator.truediv, operator.itruediv),
    "FloorDiv": (operator.floordiv, operator.ifloordiv),
    "Mod": (operator.mod, operator.imod),
    "Pow": (operator.pow, operator.ipow),
    "MatMult": (operator.matmul, operator.imatmul),
    "BitAnd": (operator.and_, operator.iand),
    "BitOr": (operator.or_, operator.ior),
    "BitXor": (operator.xor, operator.ixor),
    "LShift": (operator.lshift, operator.ilshift),
    "RShift": (operator.rshift, operator.irshift),
}


class TensorRange:
    """`range` with a tensor among its bounds, while it is traced."""

    def __init__(self, start: Any, stop: Any, step: Any) -> None:
        self.start = start
        self.stop = stop
        self.step = step


class Loop:
    """A `for` loop's parts, as the operators hand them around."""

    def __init__(self, turn: Any, names: tuple[str, ...], stop: int | None, site: Site, like: Any, extras: Any) -> None:
        self.turn = turn
        self.names = names
        self.stop = stop
        self.site = site
        self.like = like
        self.extras = extras


class Operators:
    """The operators at one depth of tensor conditions, for real or only to look.

    Depths are letters: the tracer may take a number that it meets with two values for a variable one.
    """

    def __init__(self, is_probing: bool, depth: str) -> None:
        self.is_probing = is_probing
        self.depth = depth
        self.undefined = UNDEFINED
        self.probing: Operators | None = None  # one condition deeper, only to look
        self.building: Operators | None = None

    # ---- conditions

    def as_condition(self, value: Tensor, site: Site) -> Tensor:
        """A tensor's truth as a boolean tensor without dimensions; as in Python, it must have one element."""
        if value.numel() != 1:
            refuse(
                site.key,
                self.depth,
                f"the truth of {describe(value)} is ambiguous",
                "reduce it to one element, for example with .any() or .all()",
            )
        value = value.reshape(())
        return value if value.dtype == torch.bool else value != 0

    def not_(self, value: Any, site: Site) -> Any:
        return torch.logical_not(self.as_condition(value, site)) if is_traced(value) else not value

    def and_(self, left: Any, right: Callable[[], Any], site: Site) -> Any:
        """`left and right()` where only its truth matters."""
        if not is_traced(left):
            return left and right()
        value = right()
        if is_traced(value):
            return torch.logical_and(self.as_condition(left, site), self.as_condition(value, site))
        return self.as_condition(left, site) if value else False

    def or_(self, left: Any, right: Callable[[], Any], site: Site) -> Any:
        """`left or right()` where only its truth matters."""
        if not is_traced(left):
            return left or right()
        value = right()
        if is_traced(value):
            return torch.logical_or(self.as_condition(left, site), self.as_condition(value, site))
        return True if value else self.as_condition(left, site)

    def compare(self, names: tuple[str, ...], left: Any, rights: Any, site: Site) -> Any:
        """A chain such as `low < x < high`, each operand computed once and only while the chain holds."""
        result: Any = True
        for index in builtins.range(len(names)):
            right = rights[index]()
            holds = COMPARISONS[names[index]](left, right)
            result = self._join(result, holds, site) if index > 0 else holds
            if index + 1 < len(names) and not is_traced(result) and not result:
                return result
            left = right
        return result

    def _join(self, left: Any, right: Any, site: Site) -> Any:
        return self.and_(left, lambda: right, site)

    def test(self, value: Any, site: Site) -> Any:
        """The condition of a statement that stays Python; a traced tensor is refused there."""
        if is_traced(value) and not site.is_native:
            refuse(
                site.key,
                self.depth,
                f"a tensor condition in {site.kind} cannot become a graph",
                HINTS.get(site.kind, HINT),
            )
        return value

    def assert_(self, value: Any, message: Callable[[], Any] | None, site: Site) -> None:
        if not is_traced(value):
            if not value:
                raise AssertionError(*([] if message is None else [message()]))
            return
        if not self.is_probing:
            self._require(self.as_condition(value, site), f"assertion failed at {site.place}", site)

    def raise_if(self, value: Any, error: Callable[[], Any], site: Site) -> None:
        """`if value: raise error()`; in a graph, a check that fails when it runs."""
        if not is_traced(value):
            if value:
                raise error()
            return
        if not self.is_probing:
            self._require(
                torch.logical_not(self.as_condition(value, site)), f"the error at {site.place} was raised", site
            )

    def _require(self, condition: Tensor, message: str, site: Site) -> None:
        if self.depth > OUTSIDE:
            refuse(
                site.key,
                self.depth,
                "a check on a tensor inside a tensor condition cannot become a graph",
                "make the check before the condition, or combine both into one check outside",
            )
        note(site.key)
        torch._assert_async(condition, message)

    # ---- choosing

    def cond(self, value: Any, then: Any, other: Any, values: Any, names: Any, site: Site, like: Any) -> Any:
        """An `if`: the branches take the operators and `values`, and give the variables `names` (or the result)."""
        if not is_traced(value):
            return then(self, *values) if value else other(self, *values)
        if site.is_native:
            torch._dynamo.graph_break()
            return then(self, *values) if value else other(self, *values)
        condition = self.as_condition(value, site)
        probe = self._deeper(True, site)
        first, second = run_probe(then, probe, values), run_probe(other, probe, values)
        form = merge_all(first, second, names, site, (*like, *values), condition.device)
        if self.is_probing:
            return rebuild(form, flatten(form, first))
        note(site.key)
        return self._build_cond(condition, then, other, values, form, site)

    def either(self, value: Any, then: Any, other: Any, site: Site, like: Any) -> Any:
        """`value and ...` or `value or ...` as a value: both branches receive it."""
        return self.cond(value, then, other, (value,), None, site, like)

    def _build_cond(self, condition: Tensor, then: Any, other: Any, values: Any, form: Form, site: Site) -> Any:
        if not has_leaves(form):
            return rebuild(form, [])
        real = self._deeper(False, site)
        values = [unalias(value) for value in values]

        def true_branch() -> list[Tensor]:
            return flatten(form, then(real, *steady(values)))

        def false_branch() -> list[Tensor]:
            return flatten(form, other(real, *steady(values)))

        return rebuild(form, choose(condition, true_branch, false_branch, leaves_of(form)))

    def _deeper(self, is_probing: bool, site: Site) -> Operators:
        found = self.probing if is_probing else self.building
        if found is None:
            refuse(
                site.key,
                self.depth,
                f"tensor conditions are nested {MAX_DEPTH} deep",
                "split the function, or look the answer up in a table",
            )
            return self
        enter(site.key, found.depth)
        return found

    # ---- loops

    def while_(
        self,
        test: Any,
        body: Any,
        values: Any,
        names: tuple[str, ...],
        stop: int | None,
        site: Site,
        like: Any,
        extras: Any = (),
    ) -> Any:
        """A `while`: `test` and `body` take the operators and the variables; `stop` is the place of the break flag.

        `extras` are what `body` only reads; it takes them after the variables.
        """
        while True:
            going = is_going(self, test, values, stop, site)
            if is_traced(going) and not site.is_native:
                return self._graph_while(test, body, values, names, stop, site, like, extras, going)
            if is_traced(going):
                torch._dynamo.graph_break()
            if not going:
                return values
            values = body(self, *values, *extras)

    def _graph_while(
        self,
        test: Any,
        body: Any,
        values: Any,
        names: tuple[str, ...],
        stop: int | None,
        site: Site,
        like: Any,
        extras: Any,
        going: Tensor,
    ) -> Any:
        condition = self.as_condition(going, site)
        probe = self._deeper(True, site)
        form = settle(body, probe, values, extras, names, site, (*like, *values, *extras), condition.device)
        if self.is_probing:
            return rebuild(form, flatten(form, values))
        note(site.key)
        for index in builtins.range(len(names)):
            if values[index] is UNDEFINED and not names[index].startswith(INTERNAL):
                torch._assert_async(condition, f"{names[index]} has no value: the loop at {site.place} made no turn")
        if not has_leaves(form):
            refuse(
                site.key,
                self.depth,
                "the loop changes no variable and would never end",
                "change what its condition reads",
            )
        real = self._deeper(False, site)

        def going_on(*leaves: Tensor) -> Tensor:
            going = is_going(real, test, rebuild(form, list(leaves)), stop, site)
            if not is_traced(going):
                return torch.full((), bool(going), device=condition.device)
            return real.as_condition(going, site).clone()

        def turn(*leaves: Tensor) -> tuple[Tensor, ...]:
            values = rebuild(form, list(steady(leaves)))
            return tuple(flatten(form, body(real, *values, *steady(extras))))

        def careful_turn(*leaves: Tensor) -> tuple[Tensor, ...]:
            return tuple(choose(going_on(*leaves), lambda: turn(*leaves), lambda: copy_all(leaves), leaves_of(form)))

        start = tuple(flatten(form, values))
        is_trained = torch.is_grad_enabled() and any(leaf.is_floating_point() for leaf in start)
        if is_trained and not all_require_grad(start):
            start = careful_turn(*start)
        found = loop(going_on, careful_turn if is_trained else turn, start)
        # In training these are the last rows of all turns' values; a copy has no offset into them.
        return rebuild(form, [leaf.clone() for leaf in found] if is_trained else list(found))

    def for_(
        self,
        items: Any,
        turn: Any,
        values: Any,
        names: tuple[str, ...],
        stop: int | None,
        site: Site,
        like: Any,
        extras: Any = (),
    ) -> Any:
        """A `for`: `turn` takes the operators, the item, the variables, and the `extras` that it only reads."""
        loop = Loop(turn, names, stop, site, like, extras)
        if isinstance(items, TensorRange):
            return self._count(items.start, items.stop, items.step, values, loop)
        if is_traced(items) and items.dim() > 0 and items.shape[0] > UNROLLED_ROWS and not site.is_native:
            return self._walk_rows(items, values, loop)
        remaining = len(items) if isinstance(items, builtins.range) else 0
        for item in items:
            ended = False if stop is None else values[stop]
            if is_traced(ended):
                if remaining > UNROLLED_TURNS and site.is_plain_counter:
                    return self._count(item, items.stop, items.step, values, loop)
                values = self._maybe_turn(ended, item, values, loop)
            else:
                values = turn(self, item, *values, *extras)
                ended = False if stop is None else values[stop]
                if not is_traced(ended) and ended:
                    break
            remaining -= 1
        return values

    def _maybe_turn(self, ended: Any, item: Any, values: Any, loop: Loop) -> Any:
        count = len(values)

        def skip(_: Operators, *values: Any) -> Any:
            return values[:count]

        def turn(operators: Operators, *values: Any) -> Any:
            return loop.turn(operators, item, *values)

        return self.cond(ended, skip, turn, (*values, *loop.extras), loop.names, loop.site, loop.like)

    def _count(self, start: Any, end: Any, step: Any, values: Any, loop: Loop) -> Any:
        """A counted loop as a `while` with the counter as its first variable."""

        def test(_: Operators, counter: Any, *__: Any) -> Any:
            if is_number(step):
                return counter < end if step > 0 else counter > end
            return torch.where(step > 0, counter < end, counter > end)

        def turn(operators: Operators, counter: Any, *values: Any) -> Any:
            return (counter + step, *loop.turn(operators, counter, *values))

        stop = None if loop.stop is None else loop.stop + 1
        names = (f"{INTERNAL}counter", *loop.names)
        return self.while_(test, turn, (start, *values), names, stop, loop.site, loop.like, loop.extras)[1:]

    def _walk_rows(self, rows: Tensor, values: Any, loop: Loop) -> Any:
        def test(_: Operators, counter: Any, *__: Any) -> Any:
            return counter < rows.shape[0]

        def body(operators: Operators, counter: Any, *values: Any) -> Any:
            row = values[-1].index_select(0, counter.reshape(1)).squeeze(0)
            return (counter + 1, *loop.turn(operators, row, *values[:-1]))

        start = torch.zeros((), dtype=torch.int64, device=rows.device)
        stop = None if loop.stop is None else loop.stop + 1
        names = (f"{INTERNAL}counter", *loop.names)
        extras = (*loop.extras, rows)
        return self.while_(test, body, (start, *values), names, stop, loop.site, loop.like, extras)[1:]

    def iterate(self, items: Any, site: Site) -> Any:
        """What a loop that stays Python walks over."""
        if isinstance(items, TensorRange):
            refuse(site.key, self.depth, "a range of tensors is walked in a loop that cannot become a graph", HINT)
        return items

    def range(self, *bounds: Any) -> Any:
        if not any(is_traced(bound) for bound in bounds):
            return builtins.range(*bounds)
        if len(bounds) == 1:
            return TensorRange(0, bounds[0], 1)
        return TensorRange(bounds[0], bounds[1], bounds[2] if len(bounds) > 2 else 1)

    # ---- values that Python would take out of a tensor

    def to_number(self, kind: str, value: Any) -> Any:
        """`int(value)`, `float(value)` or `bool(value)`; of a traced tensor, one without dimensions or gradient."""
        if not is_traced(value):
            return NUMBERS[kind](value)
        value = value.detach().reshape(())
        if kind == "bool":
            return value if value.dtype == torch.bool else value != 0
        if kind == "int":
            return value.to(torch.int64)
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())

    def real(self, value: Any, like: Any) -> Any:
        """A number of plain Python's in a calculation with floats; a tensor in a graph is made one of floats.

        A whole number in a graph times 0.1 would be float32 for torch, where Python has all digits.
        """
        if is_traced(value) and not value.is_floating_point():
            return value.to(choose_float(like))
        return value

    def item(self, value: Any) -> Any:
        return value.detach().reshape(()) if is_traced(value) else value.item()

    def get(self, value: Any, index: Any) -> Any:
        """`value[index]`, where the index may be a traced number."""
        if isinstance(value, Tensor) and is_traced(index) and is_index(index):
            return torch.ops.aten.index.Tensor(value, [index])
        if isinstance(value, Tensor) and isinstance(index, tuple) and is_plain_index(index):
            return torch.ops.aten.index.Tensor(value, as_indices(value, index))
        return value[index]

    def set(self, value: Any, index: Any, new: Any, owner: Operators | None, site: Site) -> Any:
        """`value[index] = new` for a variable that alone holds its tensor; gives what it holds afterwards."""
        if not isinstance(value, Tensor):
            self.effect(owner, site)
            value[index] = new
            return value
        is_inside = self._is_inside(owner)
        has_traced = (is_traced(index) and is_index(index)) or (isinstance(index, tuple) and is_plain_index(index))
        if has_traced:
            if not isinstance(new, Tensor):
                new = torch.full((), new, dtype=value.dtype, device=value.device)
            indices = as_indices(value, index if isinstance(index, tuple) else (index,))
            return torch.index_put(value, indices, new.to(value.dtype))
        if is_inside:
            value = value.clone()
        value[index] = new
        return value

    def append(self, value: Any, new: Any, owner: Operators | None) -> Any:
        """`value.append(new)` for a list that one variable alone holds; gives what it holds afterwards."""
        if self._is_inside(owner) and isinstance(value, list):
            return [*value, new]
        value.append(new)
        return value

    def augment(self, name: str, value: Any, other: Any, owner: Operators | None, is_fresh: bool, site: Site) -> Any:
        """`value += other`: in place as in Python, and a new tensor where that would reach out of a branch."""
        plain, in_place = BINARY[name]
        if not isinstance(value, Tensor):
            if isinstance(value, (list, dict, builtins.set)):
                self.effect(owner, site)
            return in_place(value, other)
        if not self._is_inside(owner):
            return in_place(value, other)
        if not is_fresh:
            self.effect(owner, site)
        result = plain(value, other)
        return result if result.dtype == value.dtype else result.to(value.dtype)

    def _is_inside(self, owner: Operators | None) -> bool:
        """Whether a tensor condition stands between here and where a variable was made."""
        return self.depth > (OUTSIDE if owner is None else owner.depth)

    def effect(self, owner: Operators | None, site: Site) -> None:
        """Stands before a statement that changes something; refused where that lies outside of a tensor condition."""
        if self._is_inside(owner) and torch.compiler.is_compiling():
            refuse(
                site.key,
                self.depth,
                "this changes something outside of the tensor condition that surrounds it, on one side only",
                "assign to a local variable in the branch and make the change after it",
            )

    def check(self, value: Any, name: str) -> Any:
        """A variable that may have no value yet."""
        if value is UNDEFINED:
            raise UnboundLocalError(f"cannot access local variable '{name}' where it is not associated with a value")
        return value

    # ---- calls

    def mark(self, function: Any) -> Any:
        """A function defined inside rewritten code is rewritten already."""
        function.__ds__ = True
        return function

    def method(self, value: Any, name: str) -> Any:
        found = getattr(value, name)
        return found if isinstance(value, Tensor) else self.call(found)

    def parent(self, cls: Any, value: Any, name: str) -> Any:
        """`super().name` in a method of `cls`."""
        above: Any = super(cls, value)  # type: ignore[misc, unused-ignore]
        is_above = False
        for each in type(value).__mro__:
            function = each.__dict__[name] if is_above and name in each.__dict__ else None
            if function is not None:
                is_function = isinstance(function, types.FunctionType)
                return functools.partial(self.call(function), value) if is_function else getattr(above, name)
            is_above = is_above or each is cls
        return getattr(above, name)

    def call(self, function: Any) -> Any:
        """What to call instead of `function`: its rewritten twin if it is the user's own code, else itself."""
        if isinstance(function, types.MethodType):
            twin = find_twin(function.__func__)
            return function if twin is None else functools.partial(twin, self, function.__self__)
        if isinstance(function, types.FunctionType):
            twin = find_twin(function)
            return function if twin is None else functools.partial(twin, self)
        if isinstance(function, nn.Module):
            return self._call_module(function)
        if isinstance(function, Rewritable):
            twin = find_twin(function.function)
            twin = functools.partial(twin, self)
            return twin if function.owner is None else functools.partial(twin, function.owner)
        if isinstance(function, functools.partial):
            return functools.partial(self.call(function.func), *function.args, **function.keywords)
        return function

    def _call_module(self, module: nn.Module) -> Any:
        if all(is_library(type(each).__module__) for each in module.modules()):
            return module
        twin = find_twin(find_forward(module), is_asked=True)  # a library's container may hold the user's modules
        if twin is None:
            return module
        forward = functools.partial(twin, self, module)
        if module._forward_hooks or module._forward_pre_hooks:
            return functools.partial(call_with_hooks, module, forward)
        return forward


def is_going(operators: Operators, test: Any, values: Any, stop: int | None, site: Site) -> Any:
    if stop is None:
        return test(operators, *values)
    return operators.and_(operators.not_(values[stop], site), lambda: test(operators, *values), site)


def _make_operators() -> Operators:
    """The outermost operators, with the deeper ones behind them."""
    probing, building = None, None
    for depth in reversed(DEPTHS):
        pair = [Operators(True, depth), Operators(False, depth)]
        for each in pair:
            each.probing, each.building = probing, building
        probing, building = pair
    assert building is not None
    return building


BUILDING = _make_operators()
