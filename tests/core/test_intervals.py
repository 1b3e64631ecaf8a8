"""Both ends belong to a measurement; one alone is a measurement of its own."""

from __future__ import annotations

from deepseek.core.intervals import find_ends


def test_an_interval_has_a_measurement_and_both_of_its_ends() -> None:
    names = {"a", "a_low", "a_high", "b_low", "b_high", "c", "c_low", "a_low_low", "a_low_high"}
    assert find_ends(names) == {"a": ("a_low", "a_high"), "a_low": ("a_low_low", "a_low_high")}
    assert find_ends([]) == {}
