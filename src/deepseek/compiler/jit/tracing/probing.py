"""What both branches of a condition give, and what the variables of a loop are, by tracing them aside.

`probe_branches` merges what two branches give. `converge` traces an iteration of a loop until it changes no type any
more, since a counter that starts as a Python number is one of the graph from the second iteration on. Nothing that is
traced here remains (`speculation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from deepseek.compiler.jit.shared_names import RESULT_NAME
from deepseek.compiler.jit.tracing.merging import (
    UNDEFINED,
    Container,
    Form,
    Leaf,
    Merger,
    flatten,
    has_leaves,
    leaves_of,
    rebuild,
)
from deepseek.compiler.jit.tracing.sites import count_writes, has_written, refuse
from deepseek.compiler.jit.tracing.speculation import PROBE

Part = Callable[..., Any]
"""A part of the user's function: takes the operators and values, gives values."""


def probe_branches(then: Part, other: Part, operators: Any, values: Sequence[Any], merger: Merger) -> Form:
    """Return the form of what two branches give."""
    site = merger.site
    first = PROBE(then, site.key, operators.depth, operators, *values)
    second = PROBE(other, site.key, operators.depth, operators, *values)
    if site.names is None:
        merger.results = (first, second)
        return merger.merge(first, second, "the result")
    return merger.merge_variables(first, second, site.names)


def converge(
    body: Part,
    operators: Any,
    values: Sequence[Any],
    extras: Sequence[Any],
    names: tuple[str, ...],
    merger: Merger,
) -> Container:
    """Return the form of a loop's variables `names` that an iteration does not change any more."""
    site = merger.site
    form = merger.merge_variables(values, values, names)
    num_writes = count_writes()
    sources: list[list[Tensor]] = [[] for _ in names]

    for _ in range(2 * len(names) + 2):
        known = form

        def iterate(operators: Any, *values: Any, known: Container = known) -> Any:
            before = rebuild(known, flatten(known, values)) if has_leaves(known) else values
            after = body(operators, *before, *extras)
            return before, [_distinct(after[index], known.children[index]) for index in range(len(names))]

        before, after = PROBE(iterate, site.key, operators.depth, operators, *values)
        merger.results = ([after[index] for index in range(len(names)) if names[index] != RESULT_NAME],)
        form = _merge_iterations(before, after, names, merger)
        for index in range(len(names)):
            sources[index] += [source for leaf in leaves_of(form.children[index]) for source in leaf.sources]
        if _is_same(known, form):
            if has_written(tuple(names[index] for index in range(len(names)) if sources[index]), num_writes):
                refuse(
                    site.key,
                    None,
                    "an iteration gives one tensor, or views of one, to several variables, and writes into one of them"
                    " in place, which a graph would do to one of them only",
                    "write y = y + 1 in place of y += 1, or copy with .clone()",
                )
            for index in range(len(names)):
                for leaf in leaves_of(form.children[index]):
                    leaf.sources = tuple(sources[index])
            return form
    refuse(
        site.key,
        None,
        "the types of the loop's variables change with every iteration",
        "convert them before the loop",
    )
    return form


def _distinct(value: Any, form: Form) -> Any:
    """Return a value that is another object where the loop is known to change its variable."""
    return rebuild(form, flatten(form, value)) if has_leaves(form) and value is not UNDEFINED else value


def _merge_iterations(before: Any, after: Any, names: tuple[str, ...], merger: Merger) -> Container:
    forms = []
    for index in range(len(names)):
        if before[index] is UNDEFINED and after[index] is not UNDEFINED:
            forms.append(merger.fill(after[index], names[index]))
        else:
            forms.append(merger.merge(before[index], after[index], names[index]))
    return Container(tuple, None, forms)


def _is_same(first: Form, second: Form) -> bool:
    if isinstance(first, Leaf) and isinstance(second, Leaf):
        return first.dtype == second.dtype and first.is_number == second.is_number
    if isinstance(first, Container) and isinstance(second, Container):
        if len(first.children) != len(second.children):
            return False
        return all(_is_same(first.children[index], second.children[index]) for index in range(len(first.children)))
    return type(first) is type(second)
