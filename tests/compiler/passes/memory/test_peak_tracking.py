"""Two ways of measuring memory agree."""

import torch

from deepseek.compiler.passes.memory.peak_tracking import StorageTracker, measure_peak_bytes


def test_the_tracker_forgets_what_is_released_and_does_not_count_what_was_there():
    before = torch.ones(100)
    with StorageTracker() as tracker:
        one = before * 2
        view = one[:10]
        del one
        assert tracker.alive_bytes == 400
        del view
        assert tracker.alive_bytes == 0
        before.view(10, 10)
        del before
        again = torch.ones(100)
        assert tracker.alive_bytes == again.nbytes
    assert tracker.peak_bytes == 400


def test_both_ways_of_measuring_agree_on_what_a_function_keeps():
    peak = measure_peak_bytes(lambda: torch.ones(1000).exp())
    assert (peak.peak_bytes, peak.left_bytes) == (8000, 4000)
