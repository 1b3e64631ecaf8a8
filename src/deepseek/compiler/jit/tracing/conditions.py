"""The truth of values: `not`, `and`, `or`, chained comparisons, and checks (`assert`, `if c: raise`)."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from deepseek.compiler.jit.tracing.merging import UNDEFINED, describe, is_traced
from deepseek.compiler.jit.tracing.python_numbers import Number, is_number, relate
from deepseek.compiler.jit.tracing.sites import Site, enter, note, refuse

HINT = "move the condition out of it, or compute both sides and choose with torch.where"
HINTS = {
    "a comprehension": "write it as a loop, or choose with torch.where",
    "try": "move the condition out of the try block",
    "a condition with :=": "assign to the variable in a statement of its own before the condition",
}
COLLECTIONS = (builtins.range, list, tuple, set, frozenset, dict)
DEPTHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OUTSIDE = DEPTHS[0]
MAX_DEPTH = len(DEPTHS) - 1  # tensor conditions inside one another


class ConditionOperators:
    """The operators at one depth of tensor conditions, for real or only to look.

    Depths are letters: the tracer may take a number that it meets with two values for a variable one.
    """

    def __init__(self, depth: str, *, is_probing: bool) -> None:
        self.is_probing = is_probing
        self.depth = depth
        self.undefined = UNDEFINED
        self.probing: Self | None = None  # one condition deeper, only to look
        self.building: Self | None = None

    def deeper(self, site: Site, *, is_probing: bool) -> Self:
        """Return the operators inside one more tensor condition."""
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

    def as_condition(self, value: Any, site: Site) -> Tensor:
        """Return a tensor's truth as a boolean tensor without dimensions; as in Python, it must have one element."""
        tensor: Tensor = value.tensor if isinstance(value, Number) else value
        if tensor.numel() != 1:
            refuse(
                site.key,
                self.depth,
                f"the truth of {describe(tensor)} is ambiguous",
                "reduce it to one element, for example with .any() or .all()",
            )
        tensor = tensor.reshape(())
        return tensor if tensor.dtype == torch.bool else tensor != 0

    def not_(self, value: Any, site: Site) -> Any:
        return Number(torch.logical_not(self.as_condition(value, site))) if is_traced(value) else not value

    def and_(self, left: Any, right: Callable[[], Any], site: Site) -> Any:
        """`left and right()` where only its truth matters."""
        if not is_traced(left):
            return left and right()
        value = right()
        if is_traced(value):
            return Number(torch.logical_and(self.as_condition(left, site), self.as_condition(value, site)))
        return Number(self.as_condition(left, site)) if value else False

    def or_(self, left: Any, right: Callable[[], Any], site: Site) -> Any:
        """`left or right()` where only its truth matters."""
        if not is_traced(left):
            return left or right()
        value = right()
        if is_traced(value):
            return Number(torch.logical_or(self.as_condition(left, site), self.as_condition(value, site)))
        return True if value else Number(self.as_condition(left, site))

    def compare(self, names: tuple[str, ...], left: Any, rights: Sequence[Callable[[], Any]], site: Site) -> Any:
        """A chain such as `low < x < high`, each operand computed once and only while the chain holds."""
        result: Any = True
        for index in builtins.range(len(names)):
            right = rights[index]()
            holds = relate(names[index], left, right)
            result = self._join(result, holds, site) if index > 0 else holds
            if index + 1 < len(names) and not is_traced(result) and not result:
                return result
            left = right
        return result

    def is_in(self, value: Any, items: Any) -> Any:
        """`value in items`; of a number of the graph among known items, a bool of the graph."""
        if not is_traced(value) or isinstance(value, Tensor) or not isinstance(items, COLLECTIONS):
            return value in items
        if isinstance(items, builtins.range):
            steps: Any = (value - items.start) // items.step
            is_met = relate("Eq", items.start + steps * items.step, value).tensor
            is_ahead = relate("GtE", steps, 0).tensor
            return Number(is_met & is_ahead & relate("Lt", steps, len(items)).tensor)
        if any(isinstance(item, Tensor) for item in items):
            return value in items
        found: Any = False
        for item in items:
            if is_number(item):
                holds = relate("Eq", value, item)
                found = Number(torch.logical_or(found.tensor, holds.tensor)) if isinstance(found, Number) else holds
        return found

    def _join(self, left: Any, right: Any, site: Site) -> Any:
        return self.and_(left, lambda: right, site)

    def test(self, value: Any, site: Site) -> Any:
        """Return the condition of a statement that stays Python; a traced tensor is refused there."""
        if is_traced(value) and not site.is_native:
            refuse(
                site.key,
                self.depth,
                f"a tensor condition in {site.kind} cannot become a graph",
                HINTS.get(site.kind, HINT),
            )
        return value

    def subject(self, value: Any, site: Site) -> Any:
        """Return the subject of a match; a number of the graph is refused, since patterns look at what it is."""
        if _holds_number(value):
            if site.is_native:
                return _take_out(value)
            refuse(
                site.key,
                self.depth,
                "a match on a number that is made from a tensor cannot become a graph",
                "compare it with if and elif",
            )
        return value

    # ---- checks

    def assert_(self, value: Any, message: Callable[[], Any] | None, site: Site) -> None:
        if not is_traced(value):
            if not value:
                raise AssertionError(*([] if message is None else [message()]))
            return
        self._require(self.as_condition(value, site), f"assertion failed at {site.place}", site)

    def raise_if(self, value: Any, error: Callable[[], Any], site: Site) -> None:
        """`if value: raise error()`; in a graph, a check that fails when it runs."""
        if not is_traced(value):
            if value:
                raise error()
            return
        self._require(torch.logical_not(self.as_condition(value, site)), f"the error at {site.place} was raised", site)

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


def _holds_number(value: Any) -> bool:
    """Return whether a number of the graph is `value`, or stands somewhere in it."""
    if isinstance(value, (tuple, list)):
        return any(_holds_number(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_number(item) for item in value.values())
    return isinstance(value, Number) and is_traced(value)


def _take_out(value: Any) -> Any:
    """Return `value` with plain Python numbers, for which the graph breaks."""
    if isinstance(value, (tuple, list)):
        items = [_take_out(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _take_out(item) for key, item in value.items()}
    return value.tensor.item() if isinstance(value, Number) else value
