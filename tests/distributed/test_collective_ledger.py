import sys

from deepseek.distributed.collective_ledger import CollectiveLedger, LatencyHistogram, find_site


def test_calls_are_numbered_per_group_and_keep_their_line():
    ledger = CollectiveLedger()
    first = ledger.begin("dp", "all_reduce", (2, 3), "float32", 24)
    other = ledger.begin("tp", "all_gather", (4,), "int64", 32)
    second = ledger.begin("dp", "barrier", (0,), "float32", 0)
    assert [call.sequence for call in (first, other, second)] == [1, 1, 2]
    line = test_calls_are_numbered_per_group_and_keep_their_line.__code__.co_firstlineno + 2
    assert first.site == f"{__file__}:{line}"
    assert first.to_list() == ["dp", 1, "all_reduce", [2, 3], "float32", first.site, False]


def test_what_ended_is_summed_by_operation_and_link():
    ledger = CollectiveLedger()
    for size in (8, 24):
        ledger.end(ledger.begin("dp", "all_reduce", (size,), "uint8", size), {"inside": size, "across": 1})
    assert dict(ledger.sent_bytes) == {("all_reduce", "inside"): 32, ("all_reduce", "across"): 2}
    assert sum(ledger.latencies["all_reduce"].counts) == 2
    spent_s = sum(call.ended_s - call.began_s for call in ledger.calls)
    assert abs(ledger.latencies["all_reduce"].total_s - spent_s) < 1e-9


def test_only_the_newest_calls_are_kept():
    ledger = CollectiveLedger()
    for _ in range(5000):
        ledger.begin("world", "barrier", (0,), "float32", 0)
    assert [ledger.calls[0].sequence, ledger.calls[-1].sequence] == [905, 5000]


def test_seconds_fall_below_the_bound_that_they_do_not_exceed():
    histogram = LatencyHistogram()
    for seconds in (1e-5, 2e-5, 1e3):
        histogram.observe(seconds)
    assert [histogram.counts[0], histogram.counts[1], histogram.counts[-1]] == [1, 1, 1]


def test_a_stack_of_nothing_but_this_room_still_has_a_place():
    assert find_site(sys._getframe()).startswith(__file__)
    assert find_site(None) == "nowhere"
