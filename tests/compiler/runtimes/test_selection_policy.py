"""The policy of choosing: plain values in, decisions out, in milliseconds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.compiler.runtimes.selection_policy import (
    DEFAULT_TOLERANCES,
    NOISE,
    PRECISIONS,
    BackendSelector,
    Candidate,
    Numbers,
    Tolerance,
    choose,
    find_stale_parent,
    judge_numbers,
    keep_fastest,
    list_precisions,
    order,
    plan_rounds,
    read_tolerances,
)
from deepseek.core.errors import ConfigError

PLAIN = Candidate("eager", "plain", "fp32", prior=0)
FROZEN = Candidate("inductor", "freezing", "fp32", prior=20)
TUNED = Candidate("inductor", "tuned", "fp32", prior=50, refines="freezing")
INT8 = Candidate("openvino", "latency", "int8", prior=10)
GOOD = Numbers(relative_error=0.0, cosine=1.0, agreement=1.0)

medians = st.dictionaries(
    st.sampled_from([Candidate("x", str(index), "fp32") for index in range(8)]),
    st.floats(min_value=0.01, max_value=1e4),
    min_size=1,
)


def test_the_selector_is_a_string_that_people_can_write():
    assert BackendSelector("openvino") is BackendSelector.OPENVINO
    assert f"{BackendSelector.AUTO}" == "auto"


def test_auto_allows_every_precision_and_a_name_only_itself():
    assert list_precisions("auto") == PRECISIONS
    assert list_precisions("int8") == ("int8",)


def test_an_unknown_precision_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        list_precisions("bf61")


def test_the_likeliest_winner_is_tried_first():
    assert order([TUNED, FROZEN, INT8, PLAIN]) == [PLAIN, INT8, FROZEN, TUNED]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (Numbers(0.2, 1.0, 1.0), "relative error 0.2 is above 0.1"),
        (Numbers(math.nan, 1.0, 1.0), "relative error nan"),
        (Numbers(0.0, 0.5, 1.0), "cosine 0.50000 is below 0.9"),
        (Numbers(0.0, 1.0, 0.5), "top-1 agreement 0.500 is below 0.75"),
        (Numbers(0.0, 1.0, 1.0, is_finite=False), "NaN or infinity"),
    ],
)
def test_numbers_beyond_a_bound_are_refused_with_the_number(numbers, said):
    reason = judge_numbers(numbers, Tolerance(relative_error=0.1, cosine=0.9, agreement=0.75))
    assert reason is not None and said in reason


def test_numbers_within_the_bounds_and_without_decided_rows_pass():
    tolerance = Tolerance(0.1, 0.9, 1.0)
    assert judge_numbers(Numbers(0.1, 0.9, 1.0), tolerance) is None
    assert judge_numbers(Numbers(0.0, 1.0, None), tolerance) is None


def test_a_number_bounds_the_relative_error_of_every_precision():
    tolerances = read_tolerances(0.01)
    assert {each.relative_error for each in tolerances.values()} == {0.01}
    # Vectors that differ by 1 % in norm have a cosine of at least sqrt(1 - 0.01 ** 2).
    assert tolerances["int8"].cosine <= math.sqrt(1 - 0.01**2)


def test_a_mapping_changes_one_precision_only():
    mine = Tolerance(0.5, 0.5, 0.5)
    tolerances = read_tolerances({"int8": mine})
    assert tolerances == {**DEFAULT_TOLERANCES, "int8": mine}
    assert set(read_tolerances(mine).values()) == {mine}


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, math.inf, {"int7": Tolerance(1, 1, 1)}])
def test_a_bound_that_bounds_nothing_is_refused(tolerance):
    with pytest.raises(ConfigError):
        read_tolerances(tolerance)


def test_a_refinement_is_tried_only_near_the_best():
    assert find_stale_parent(TUNED, {FROZEN: 1.2, PLAIN: 1.0}) is None
    assert "takes 2.0 times the best" in find_stale_parent(TUNED, {FROZEN: 2.0, PLAIN: 1.0})
    assert "does not run" in find_stale_parent(TUNED, {PLAIN: 1.0})
    assert find_stale_parent(FROZEN, {PLAIN: 1.0}) is None


@given(medians)
def test_the_fastest_is_always_kept_and_nobody_beyond_the_margin(medians_ms):
    kept = keep_fastest(medians_ms, margin=0.5)
    best_ms = min(medians_ms.values())
    assert medians_ms[kept[0]] == best_ms
    assert all(medians_ms[each] <= best_ms * 1.5 for each in kept)
    assert len(kept) <= math.ceil(len(medians_ms) / 2)


@given(medians)
def test_what_is_chosen_is_the_fastest_within_the_noise(medians_ms):
    errors = {each: float(index) for index, each in enumerate(medians_ms)}
    chosen = choose(medians_ms, errors)
    best_ms = min(medians_ms.values())
    assert medians_ms[chosen] <= best_ms * (1 + NOISE)
    near = [each for each, median_ms in medians_ms.items() if median_ms <= best_ms * (1 + NOISE)]
    assert errors[chosen] == min(errors[each] for each in near)


def test_beyond_the_noise_speed_decides():
    assert choose({PLAIN: 1.1, INT8: 1.0}, {PLAIN: 0.0, INT8: 0.1}) == INT8
    assert choose({PLAIN: 1.01, INT8: 1.0}, {PLAIN: 0.0, INT8: 0.1}) == PLAIN


def test_rounds_fill_the_time_that_is_left_within_limits():
    assert plan_rounds([PLAIN, INT8], {PLAIN: 60.0, INT8: 40.0}, left_s=2.0) == 20
    assert plan_rounds([PLAIN], {PLAIN: 60_000.0}, left_s=1.0) == 5
    assert plan_rounds([PLAIN], {PLAIN: 0.001}, left_s=10.0) == 50
