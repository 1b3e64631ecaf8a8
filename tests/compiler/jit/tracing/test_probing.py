# ruff: noqa: SIM108 - the statements are the subject
"""Loops traced aside until an iteration changes no type, and what their variables share is written down."""

import pytest
import torch

from deepseek.compiler.jit.decorator import jit
from deepseek.compiler.jit.tracing.sites import ControlFlowError

UP, DOWN = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.tensor([-0.5, -1.0, -2.0], dtype=torch.float64)


def counts_until_the_types_settle(x):
    total, count = 0, 0
    while x.sum() > count:
        total = total + count / 2
        count += 1
    return x * total, count


def keeps_the_last_and_the_one_before(x):
    value, before, count = x * 1, x, 0
    while x.sum() + count < 4:
        before = value
        value = value * 2
        count += 1
    before += 1
    return value, before


def writes_what_only_the_loop_holds(x):
    count = 0
    x = x * 1
    while count + x.sum() < 3:
        if x.sum() > 0:
            x = x * 2
        x += 1
        count += 1
    return x


@pytest.mark.parametrize(
    "function",
    [counts_until_the_types_settle, keeps_the_last_and_the_one_before, writes_what_only_the_loop_holds],
)
@pytest.mark.parametrize("x", [UP, DOWN], ids=["up", "down"])
def test_a_loop_gives_what_python_gives(function, x):
    for got, want in zip(jit(function, backend="eager")(x.clone()), function(x.clone()), strict=True):
        torch.testing.assert_close(torch.as_tensor(got).double(), torch.as_tensor(want).double())


def alias_out_of_a_condition(x):
    y, count = x * 1, 0
    while x.sum() + count < 4:
        if x.sum() > 0:
            z = y
        else:
            z = y * 2
        z += 1
        count += 1
    return y


def alias_that_is_written_on_the_other_side(x):
    y, count = x * 1, 0
    while x.sum() + count < 4:
        z = y if x.sum() > 0 else y * 2
        y += 1
        count += 1
        x = x + z * 0.1
    return y, x


def alias_out_of_a_loop_in_a_loop(x):
    y, count = x * 1, 0
    while x.sum() + count < 4:
        inner = 0
        while inner < 2 and x.max() < 10:
            z = y
            inner += 1
        z += 1
        count += 1
    return y


def alias_written_after_the_loop(x):
    y, z, count = x * 1, x * 2, 0
    while x.sum() + count < 4:
        z = y
        count += 1
    z += 1
    return y


def two_results_that_are_one(x):
    y, z, count = x * 1, x * 2, 0
    while x.sum() + count < 4:
        y = y + 1
        z = y
        count += 1
    z += 1
    return y


def alias_out_of_a_function(x):
    def pick(value, sign):
        if sign > 0:
            return value
        return value * 2

    y, count = x * 1, 0
    while x.sum() + count < 4:
        z = pick(y, x.sum())
        count += 1
        z += 1
    return y


def alias_that_a_return_in_a_loop_gives(x):
    def find(value):
        for number in range(3):
            if value.sum() > number:
                return value
        return value * 2

    y = x * 1
    found = find(y)
    found += 1
    return y


def alias_written_in_a_later_condition(x):
    y = x * 1
    if x.sum() > 0:
        z = y
    else:
        z = y * 2
    if x.max() > 0:
        z += 1
    return y


ALIASES = [
    alias_out_of_a_condition,
    alias_that_is_written_on_the_other_side,
    alias_out_of_a_loop_in_a_loop,
    alias_written_after_the_loop,
    two_results_that_are_one,
    alias_out_of_a_function,
    alias_that_a_return_in_a_loop_gives,
    alias_written_in_a_later_condition,
]


@pytest.mark.parametrize("function", ALIASES)
def test_an_alias_that_is_written_is_refused_with_its_line(function):
    for x in (UP, DOWN):
        with pytest.raises(ControlFlowError, match=r"test_probing\.py:\d+"):
            jit(function, backend="eager")(x.clone())


@pytest.mark.parametrize("function", ALIASES)
@pytest.mark.filterwarnings("ignore::deepseek.compiler.jit.tracing.sites.GraphBreakWarning")
def test_where_graphs_may_break_an_alias_sees_the_write(function):
    for x in (UP, DOWN):
        want, got = function(x.clone()), jit(function, backend="eager", fullgraph=False)(x.clone())
        for found, expected in zip(torch.atleast_1d(got), torch.atleast_1d(want), strict=True):
            torch.testing.assert_close(found, expected)
