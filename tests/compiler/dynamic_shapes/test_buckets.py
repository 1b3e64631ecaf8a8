"""Boundaries and groups against trying everything; plans that do not swing."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compiler.dynamic_shapes.buckets import (
    bucket_of,
    choose_boundaries,
    group_rows,
    is_worth_replanning,
    padding_cost,
    padding_share,
)
from deepseek.core.errors import ConfigError

COUNTS = st.dictionaries(st.integers(1, 600), st.integers(1, 1000), min_size=1, max_size=8)


def quadratic(length):
    return length + length**2 / 1000


def cost_of(boundaries, counts, cost, compile_cost):
    padding = sum(
        count * (cost(min(b for b in boundaries if b >= length)) - cost(length)) for length, count in counts.items()
    )
    return padding + len(boundaries) * compile_cost


def best_by_trying_all(counts, max_buckets, cost, compile_cost):
    lengths = sorted(counts)
    sets = (
        (*chosen, lengths[-1])
        for size in range(max_buckets)
        for chosen in itertools.combinations(lengths[:-1], min(size, len(lengths) - 1))
    )
    return min(cost_of(each, counts, cost, compile_cost) for each in sets)


@settings(max_examples=150, deadline=None)
@given(COUNTS, st.integers(1, 5), st.sampled_from([0.0, 100.0, 1e5]), st.sampled_from([float, quadratic]))
def test_boundaries_cost_what_the_best_of_all_sets_costs(counts, max_buckets, compile_cost, cost):
    plan = choose_boundaries(counts, max_buckets=max_buckets, cost=cost, compile_cost=compile_cost)
    assert len(plan.boundaries) <= max_buckets
    assert plan.boundaries[-1] == max(counts)
    own = cost_of(plan.boundaries, counts, cost, compile_cost)
    assert math.isclose(plan.cost, own, rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(own, best_by_trying_all(counts, max_buckets, cost, compile_cost), rel_tol=1e-9, abs_tol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=9), st.sampled_from([0.0, 20.0, 500.0]))
def test_groups_cost_what_the_best_of_all_cuts_costs(lengths, overhead):
    lengths = sorted(lengths)

    def cost(rows, length):
        return overhead + rows * quadratic(length)

    def total(groups):
        return sum(cost(stop - start, lengths[stop - 1]) for start, stop in groups)

    groups = group_rows(lengths, cost)
    assert [row for start, stop in groups for row in range(start, stop)] == list(range(len(lengths)))
    every = (
        list(itertools.pairwise((0, *cuts, len(lengths))))
        for size in range(len(lengths))
        for cuts in itertools.combinations(range(1, len(lengths)), size)
    )
    assert math.isclose(total(groups), min(map(total, every)), rel_tol=1e-9)


def test_groups_of_a_large_batch_still_cover_every_row():
    lengths = sorted(random.Random(0).randint(1, 5000) for _ in range(2000))
    groups = group_rows(lengths, lambda rows, length: rows * length)
    assert groups[0][0] == 0
    assert groups[-1][1] == 2000
    assert all(one[1] == other[0] for one, other in itertools.pairwise(groups))
    assert sum((stop - start) * lengths[stop - 1] for start, stop in groups) < 1.1 * sum(lengths)


def test_a_length_above_all_boundaries_has_no_bucket():
    assert bucket_of(65, (8, 64)) is None
    assert padding_share({65: 3}, (8, 64)) == 0


def test_nothing_to_plan_is_refused():
    with pytest.raises(ConfigError, match="0 lengths"):
        choose_boundaries({}, max_buckets=2, cost=float)
    with pytest.raises(ConfigError, match="0 buckets"):
        choose_boundaries({3: 1}, max_buckets=0, cost=float)


COUNTED = {10: 100, 50: 100, 500: 10}


def replan(old, counts=COUNTED, **changes):
    new = choose_boundaries(counts, max_buckets=3, cost=float)
    settings = {"cost": float, "compile_cost": 100.0, "batches_since": 1000} | changes
    return is_worth_replanning(old, new, counts, **settings)


def test_a_plan_that_wastes_is_left_for_one_that_does_not():
    assert replan((500,))


@pytest.mark.parametrize(
    ("old", "changes"),
    [
        ((500,), {"batches_since": 10}),  # too soon
        ((500,), {"compile_cost": 1e6}),  # compiling costs more than is saved
        ((10, 52, 500), {}),  # a gain of two positions is no reason
        ((10, 50, 500), {}),  # the same plan
    ],
)
def test_a_plan_stays_without_a_good_reason(old, changes):
    assert not replan(old, **changes)


def test_two_plans_never_take_turns():
    """Two workloads that alternate: the plan for one is left only when the gain is real, and settles."""
    small, large = {10: 100, 100: 50, 300: 5}, {12: 100, 104: 50, 300: 5}
    boundaries, changes = (300,), 0
    for turn in range(30):
        counts = (small, large)[turn % 2]
        new = choose_boundaries(counts, max_buckets=3, cost=float)
        if is_worth_replanning(boundaries, new, counts, cost=float, compile_cost=10, batches_since=1000):
            boundaries, changes = new.boundaries, changes + 1
    assert boundaries == (12, 104, 300)
    assert changes == 2


def test_padding_cost_is_that_of_the_plan():
    plan = choose_boundaries(COUNTED, max_buckets=2, cost=quadratic)
    assert math.isclose(plan.padding_cost, padding_cost(COUNTED, plan.boundaries, quadratic))
