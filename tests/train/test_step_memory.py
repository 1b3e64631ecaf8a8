"""Sums over a recording that is written by hand."""

from __future__ import annotations

from deepseek.train.allocations import KINDS, Allocation, Recording
from deepseek.train.step_memory import summarize


def test_bytes_are_added_up_over_time_by_kind_and_module() -> None:
    allocations = [
        Allocation("a", "float32[25]", 100, "before", 0.0, "parameters"),
        Allocation("a", "float32[5]", 20, "forward", 1.0, "activations", end_s=5.0),
        Allocation("a", "float32[5]", 20, "forward", 2.0, "activations", end_s=4.0),
        Allocation("b", "float32[10]", 40, "backward", 3.0, "temporary", end_s=3.5),
        Allocation("b", "float32[20]", 80, "backward", 4.5, "gradients"),
    ]
    measured = summarize(7, Recording(allocations, [("forward", 0.0), ("backward", 3.0)], 6.0), None)
    zero = dict.fromkeys(KINDS, 0)
    assert (measured.peak_bytes, measured.peak_s) == (200, 4.5)
    assert measured.peak_by_kind == zero | {"parameters": 100, "activations": 20, "gradients": 80}
    expected = [(0.0, 100), (1.0, 120), (2.0, 140), (3.0, 180), (3.5, 140), (4.0, 120), (4.5, 200), (5.0, 180)]
    assert [(at_s, sum(alive)) for at_s, alive in measured.points] == expected
    holders = [(one.path, one.kind, one.num_bytes, one.num_allocations, one.lifetime_s) for one in measured.holders]
    assert holders == [
        ("a", "parameters", 100, 1, 6.0),
        ("b", "gradients", 80, 1, 1.5),
        ("a", "activations", 20, 1, 4.0),
    ]
