"""The choice of segments is the fastest within the budget, and its peak is that of playing the passes through."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.checkpoint.segments import Choice, Segment, choose, find_peak, smallest_peak
from deepseek.core.errors import ConfigError

SEGMENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=7).map(
    lambda rows: [Segment(f"s{index}", float(time), *sizes) for index, (time, *sizes) in enumerate(rows)]
)


def play(segments, recomputed, outside):
    """The most that is there at once: forwards, then backwards, segment by segment."""
    there, peak = {"outside": outside}, outside
    for segment in segments:
        there[segment.name, "input"] = segment.input_bytes
        there[segment.name, "inside"] = segment.inside_bytes
        peak = max(peak, sum(there.values()))
        if segment.name in recomputed:
            del there[segment.name, "inside"]
    for segment in reversed(segments):
        there[segment.name, "inside"] = segment.inside_bytes
        peak = max(peak, sum(there.values()))
        del there[segment.name, "inside"], there[segment.name, "input"]
    return peak


@given(SEGMENTS, st.integers(0, 30), st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_the_choice_is_the_fastest_within_the_budget(segments, outside, share):
    names = [segment.name for segment in segments]
    low, high = smallest_peak(segments, outside_bytes=outside), find_peak(segments, [], outside_bytes=outside)
    budget = round(low + share * (high - low))
    choice = choose(segments, budget, outside_bytes=outside)
    assert play(segments, choice.recomputed, outside) == choice.peak_bytes <= budget
    subsets = [subset for size in range(len(names) + 1) for subset in combinations(names, size)]
    times = {each.name: each.time_s for each in segments}
    fitting = [subset for subset in subsets if play(segments, subset, outside) <= budget]
    assert choice.is_exact
    assert choice.extra_time_s == min(sum(times[name] for name in subset) for subset in fitting)


def test_many_different_segments_are_chosen_from_within_the_budget(monkeypatch):
    monkeypatch.setattr("deepseek.checkpoint.segments.MAX_CHOICES", 16)
    segments = [Segment(f"s{each}", 1.0 + each % 7, 10, 100 + each * 13 % 31) for each in range(60)]
    budget = find_peak(segments, []) // 2
    choice = choose(segments, budget)
    assert not choice.is_exact
    assert play(segments, choice.recomputed, 0) <= budget


def test_equal_segments_under_the_tightest_budget_all_run_again():
    segments = [Segment(f"s{each}", 1.0, 1, 10) for each in range(5)]
    assert choose(segments, smallest_peak(segments)).recomputed == ("s0", "s1", "s2", "s3")
    assert choose(segments, 10**6) == Choice((), 0.0, 55)


def test_a_budget_that_cannot_be_met_names_the_least():
    segments = [Segment("a", 1.0, 10, 100), Segment("b", 1.0, 10, 100)]
    with pytest.raises(ConfigError, match="120 are needed even if every segment is run again"):
        choose(segments, 119)
