"""Finding out what a branch or a turn gives, by running it once only to look.

`run_probe` runs a branch with probing operators. What a loop's variables are is `settle`d: a turn is looked at until it
changes no type any more, since a counter that starts as a Python number is a tensor from the second turn on. Nodes that
come from here are dead, and `cleaning` takes them out of the graph; it knows this file and these two functions by name.
"""

from __future__ import annotations

from typing import Any

import torch

from deepseek.compiler.jit.tracing.merging import (
    UNDEFINED,
    Constant,
    Form,
    Leaf,
    Node,
    fill,
    flatten,
    has_leaves,
    merge,
    rebuild,
)
from deepseek.compiler.jit.tracing.sites import Site, refuse


def run_probe(branch: Any, operators: Any, values: Any) -> Any:
    """What a branch gives, found out by running it; `cleaning` knows this function by its name."""
    return branch(operators, *values)


def merge_all(first: Any, second: Any, names: Any, site: Site, like: Any, device: torch.device) -> Any:
    if names is None:
        return merge(first, second, "the result", site, like, device)
    forms = [merge(first[index], second[index], names[index], site, like, device) for index in range(len(names))]
    return Node(tuple, None, forms)


def settle(
    body: Any,
    probe: Any,
    values: Any,
    extras: Any,
    names: tuple[str, ...],
    site: Site,
    like: Any,
    device: torch.device,
) -> Node:
    """The form of a loop's variables that a turn does not change any more."""
    form: Node = merge_all(values, values, names, site, like, device)
    current = values
    for _ in range(2 * len(names) + 2):
        after = run_probe(body, probe, (*current, *extras))
        after = [_distinct(after[index], form.children[index]) for index in range(len(names))]
        found = _merge_loop(current, after, names, site, like, device)
        if _is_same(form, found):
            return found
        form = found
        current = rebuild(form, flatten(form, current if has_no_gap(current) else after))
    refuse(site.key, None, "the types of the loop's variables change with every turn", "convert them before the loop")
    return form


def _distinct(value: Any, form: Form) -> Any:
    """A value that is another object where the loop is known to change its variable."""
    return rebuild(form, flatten(form, value)) if has_leaves(form) and value is not UNDEFINED else value


def _merge_loop(before: Any, after: Any, names: tuple[str, ...], site: Site, like: Any, device: torch.device) -> Node:
    forms = []
    for index in range(len(names)):
        if before[index] is UNDEFINED and after[index] is not UNDEFINED:
            forms.append(fill(after[index], names[index], site, like, device))
        else:
            forms.append(merge(before[index], after[index], names[index], site, like, device))
    return Node(tuple, None, forms)


def _is_same(first: Form, second: Form) -> bool:
    if isinstance(first, Leaf) and isinstance(second, Leaf):
        return first.dtype == second.dtype
    if isinstance(first, Node) and isinstance(second, Node):
        if len(first.children) != len(second.children):
            return False
        return all(_is_same(first.children[index], second.children[index]) for index in range(len(first.children)))
    return isinstance(first, Constant) and isinstance(second, Constant)


def has_no_gap(values: Any) -> bool:
    """Whether every variable has a value."""
    return not any(value is UNDEFINED for value in values)
