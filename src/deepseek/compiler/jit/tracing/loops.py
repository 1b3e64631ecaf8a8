"""`while` and `for`: Python where the end is known, `while_loop` where a tensor decides about it."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.jit.shared_names import INTERNAL
from deepseek.compiler.jit.tracing.branches import Branches, watch
from deepseek.compiler.jit.tracing.conditions import HINT
from deepseek.compiler.jit.tracing.gradients import all_require_grad, choose, copy_all, loop, steady
from deepseek.compiler.jit.tracing.merging import (
    UNDEFINED,
    Form,
    Merger,
    flatten,
    has_leaves,
    is_traced,
    leaves_of,
    rebuild,
    sample_of,
)
from deepseek.compiler.jit.tracing.probing import Part, converge
from deepseek.compiler.jit.tracing.python_numbers import PYTHON_NUMBERS, Number, as_number, relate
from deepseek.compiler.jit.tracing.sites import Site, note, refuse

UNROLLED_ITERATIONS = 8  # a counted loop with a tensor-valued exit is unrolled up to here, and a graph loop beyond
UNROLLED_ROWS = 16  # a loop over a tensor's rows is unrolled up to here


class TensorRange:
    """`range` with a tensor among its bounds, while it is traced; where Python needs its items, the graph breaks."""

    def __init__(self, start: Any, stop: Any, step: Any) -> None:
        self.start = start
        self.stop = stop
        self.step = step

    def known(self) -> builtins.range:
        """Return the range itself; one graph has no place for it."""
        bounds = [bound.known() if isinstance(bound, Number) else bound for bound in (self.start, self.stop, self.step)]
        return builtins.range(*bounds)

    def __iter__(self) -> Iterator[int]:
        return iter(self.known())

    def __len__(self) -> int:
        return len(self.known())

    def __getitem__(self, index: Any) -> Any:
        return self.known()[index]

    def __contains__(self, value: object) -> bool:
        return value in self.known()

    def __reversed__(self) -> Iterator[int]:
        return reversed(self.known())

    def __eq__(self, other: object) -> bool:
        return self.known() == (other.known() if isinstance(other, TensorRange) else other)

    def __hash__(self) -> int:
        return hash(self.known())


class Loop:
    """A loop's parts: its test, an iteration, what an iteration only reads, its variables' names and break flag."""

    def __init__(
        self,
        test: Part,
        iterate: Part,
        extras: Sequence[Any],
        names: tuple[str, ...],
        stop: int | None,
        site: Site,
    ) -> None:
        self.test = test
        self.iterate = iterate
        self.extras = extras
        self.names = names
        self.stop = stop
        self.site = site

    def with_counter(self, test: Part, iterate: Part, extras: Sequence[Any] = ()) -> Loop:
        """Return the loop with a counter as its first variable."""
        stop = None if self.stop is None else self.stop + 1
        return Loop(test, iterate, (*self.extras, *extras), (f"{INTERNAL}counter", *self.names), stop, self.site)


class Loops(Branches):
    """Loops of a function."""

    def while_(self, test: Part, iterate: Part, values: Sequence[Any], extras: Sequence[Any], site: Site) -> Any:
        """A `while`: `test` and `iterate` take the operators and the variables; `iterate` takes the `extras`, too."""
        return self._run(Loop(test, iterate, extras, site.names or (), site.stop, site), values)

    def for_(self, items: Any, iterate: Part, values: Sequence[Any], extras: Sequence[Any], site: Site) -> Any:
        """A `for`: `iterate` takes the operators, the item, the variables, and the `extras` that it only reads."""
        loop = Loop(_never, iterate, extras, site.names or (), site.stop, site)
        if isinstance(items, TensorRange):
            return self._count(items, values, loop)
        if is_traced(items) and items.dim() > 0 and items.shape[0] > UNROLLED_ROWS and not site.is_native:
            return self._walk_rows(items, values, loop)
        remaining = len(items) if isinstance(items, builtins.range) else 0
        for item in items:
            ended = False if loop.stop is None else values[loop.stop]
            if is_traced(ended):
                if remaining > UNROLLED_ITERATIONS and site.is_plain_counter:
                    return self._count(TensorRange(item, items.stop, items.step), values, loop)
                values = self._maybe_iterate(ended, item, values, loop)
            else:
                values = iterate(self, item, *values, *extras)
                ended = False if loop.stop is None else values[loop.stop]
                if not is_traced(ended) and ended:
                    break
            remaining -= 1
        return values

    def _run(self, loop: Loop, values: Sequence[Any]) -> Any:
        while True:
            going = self._is_going(loop, values)
            if is_traced(going) and not loop.site.is_native:
                return self._build_loop(loop, values, self.as_condition(going, loop.site))
            if is_traced(going):
                torch._dynamo.graph_break()
            if not going:
                return values
            values = loop.iterate(self, *values, *loop.extras)

    def _is_going(self, loop: Loop, values: Sequence[Any]) -> Any:
        if loop.stop is None:
            return loop.test(self, *values)
        ended = self.not_(values[loop.stop], loop.site)
        return self.and_(ended, lambda: loop.test(self, *values), loop.site)

    def _build_loop(self, loop: Loop, values: Sequence[Any], condition: Tensor) -> Any:
        site = loop.site
        probe = self.deeper(site, is_probing=True)
        form = converge(
            loop.iterate, probe, values, loop.extras, loop.names, Merger(site, condition.device, is_loop=True)
        )
        if not has_leaves(form):
            refuse(
                site.key,
                self.depth,
                "the loop changes no variable and would never end",
                "change what its condition reads",
            )
        if self.is_probing:
            return rebuild(form, watch(site, [sample_of(leaf) for leaf in leaves_of(form)], form))
        note(site.key)
        self._require_values(loop, values, condition)
        real = self.deeper(site, is_probing=False)
        start = tuple(flatten(form, values))
        return self._trace_loop(loop, form, start, real, condition.device)

    def _require_values(self, loop: Loop, values: Sequence[Any], condition: Tensor) -> None:
        """Check when the graph runs that a variable which only the loop writes gets a value."""
        for index in builtins.range(len(loop.names)):
            if values[index] is UNDEFINED and not loop.names[index].startswith(INTERNAL):
                torch._assert_async(
                    condition, f"{loop.names[index]} has no value: the loop at {loop.site.place} made no iteration"
                )

    def _trace_loop(self, loop_: Loop, form: Form, start: tuple[Tensor, ...], real: Loops, device: torch.device) -> Any:
        def going_on(*leaves: Tensor) -> Tensor:
            going = real._is_going(loop_, rebuild(form, list(leaves)))
            if not is_traced(going):
                return torch.full((), bool(going), device=device)
            return real.as_condition(going, loop_.site).clone()

        def iterate(*leaves: Tensor) -> tuple[Tensor, ...]:
            values = rebuild(form, list(steady(leaves)))
            return tuple(flatten(form, loop_.iterate(real, *values, *steady(loop_.extras))))

        def iterate_if_going(*leaves: Tensor) -> tuple[Tensor, ...]:
            return tuple(choose(going_on(*leaves), lambda: iterate(*leaves), lambda: copy_all(leaves), leaves_of(form)))

        is_trained = torch.is_grad_enabled() and any(leaf.is_floating_point() for leaf in start)
        if is_trained and not all_require_grad(start):
            start = iterate_if_going(*start)
        found = loop(going_on, iterate_if_going if is_trained else iterate, start)
        # In training these are the last rows of all iterations' values; a copy has no offset into them.
        last = [leaf.clone() for leaf in found] if is_trained else list(found)
        return rebuild(form, watch(loop_.site, last, form))

    # ---- counted loops

    def _maybe_iterate(self, ended: Any, item: Any, values: Sequence[Any], loop: Loop) -> Any:
        count = len(values)

        def skip(_: Loops, *values: Any) -> Any:
            return values[:count]

        def iterate(operators: Loops, *values: Any) -> Any:
            return loop.iterate(operators, item, *values)

        return self.cond(ended, skip, iterate, (*values, *loop.extras), loop.site)

    def _count(self, items: TensorRange, values: Sequence[Any], loop: Loop) -> Any:
        """Return a counted loop as a `while` with the counter as its first variable."""

        def test(_: Loops, counter: Any, *__: Any) -> Any:
            if isinstance(items.step, PYTHON_NUMBERS):
                return relate("Lt" if items.step > 0 else "Gt", counter, items.stop)
            is_up = self.as_condition(items.step > 0, loop.site)
            ahead, behind = relate("Lt", counter, items.stop), relate("Gt", counter, items.stop)
            return Number(torch.where(is_up, self.as_condition(ahead, loop.site), self.as_condition(behind, loop.site)))

        def iterate(operators: Loops, counter: Any, *values: Any) -> Any:
            return (counter + items.step, *loop.iterate(operators, counter, *values))

        return self._run(loop.with_counter(test, iterate), (items.start, *values))[1:]

    def _walk_rows(self, rows: Tensor, values: Sequence[Any], loop: Loop) -> Any:
        def test(_: Loops, counter: Any, *__: Any) -> Any:
            return relate("Lt", counter, rows.shape[0])

        def iterate(operators: Loops, counter: Any, *values: Any) -> Any:
            row = values[-1].index_select(0, counter.tensor.reshape(1)).squeeze(0)
            return (counter + 1, *loop.iterate(operators, row, *values[:-1]))

        start = Number(torch.zeros((), dtype=torch.int64, device=rows.device))
        return self._run(loop.with_counter(test, iterate, extras=(rows,)), (start, *values))[1:]

    def iterate(self, items: Any, site: Site) -> Any:
        """Return the items of a loop that stays Python; a range of tensors is refused."""
        if isinstance(items, TensorRange):
            if site.is_native:
                return items.known()
            refuse(site.key, self.depth, "a range of tensors is walked in a loop that cannot become a graph", HINT)
        return items

    def range(self, *bounds: Any) -> Any:
        """`range`; a tensor among the bounds is the whole number that it holds."""
        if not any(is_traced(bound) for bound in bounds):
            return builtins.range(*bounds)
        known = [as_number(bound) if isinstance(bound, Tensor) else bound for bound in bounds]
        if len(known) == 1:
            return TensorRange(0, known[0], 1)
        return TensorRange(known[0], known[1], known[2] if len(known) > 2 else 1)


def _never(*_: Any) -> bool:
    """Return the test of a loop over items, which has none."""
    return False
