"""`if`, `a if c else b`, `and`, `or` as values: Python where the condition is known, `torch.cond` where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.jit.tracing.conditions import ConditionOperators
from deepseek.compiler.jit.tracing.gradients import choose, steady, unalias
from deepseek.compiler.jit.tracing.merging import (
    Form,
    Merger,
    flatten,
    has_leaves,
    is_traced,
    leaves_of,
    provide_zeros,
    rebuild,
    sample_of,
)
from deepseek.compiler.jit.tracing.probing import Part, probe_branches
from deepseek.compiler.jit.tracing.sites import Site, note
from deepseek.compiler.jit.tracing.speculation import WATCH


class Branches(ConditionOperators):
    """Choices between two parts of a function."""

    def cond(self, value: Any, then: Part, other: Part, values: Sequence[Any], site: Site) -> Any:
        """An `if`: the branches take the operators and `values`, and give the variables of the site (or the result)."""
        if not is_traced(value):
            return then(self, *values) if value else other(self, *values)
        if site.is_native:
            torch._dynamo.graph_break()
            return then(self, *values) if value else other(self, *values)
        condition = self.as_condition(value, site)
        form = probe_branches(then, other, self.deeper(site, is_probing=True), values, Merger(site, condition.device))
        if not self.is_probing:
            note(site.key)
        return self._build(condition, then, other, values, form, site)

    def either(self, value: Any, then: Part, other: Part, site: Site) -> Any:
        """`value and ...` or `value or ...` as a value: both branches receive it."""
        return self.cond(value, then, other, (value,), site)

    def _build(self, condition: Tensor, then: Part, other: Part, values: Sequence[Any], form: Form, site: Site) -> Any:
        if not has_leaves(form):
            return rebuild(form, [])
        if self.is_probing:
            return rebuild(form, watch(site, [sample_of(leaf) for leaf in leaves_of(form)], form))
        real = self.deeper(site, is_probing=False)
        values = [unalias(value) for value in values]
        leaves = leaves_of(form)
        provide_zeros(leaves)

        def true_branch() -> list[Tensor]:
            return flatten(form, then(real, *steady(values)))

        def false_branch() -> list[Tensor]:
            return flatten(form, other(real, *steady(values)))

        return rebuild(form, watch(site, choose(condition, true_branch, false_branch, leaves), form))


def watch(site: Site, found: list[Tensor], form: Form) -> list[Tensor]:
    """Remember the tensors that come out as copies of what Python would share."""
    leaves = leaves_of(form)
    for index in range(len(leaves)):
        if len(leaves[index].sources) > 0:
            WATCH(site.key, found[index], *leaves[index].sources)
    return found
