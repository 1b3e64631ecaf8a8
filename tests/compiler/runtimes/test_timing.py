"""Timing in turns, on a clock that the test moves."""

from __future__ import annotations

import pytest

from deepseek.compiler.runtimes.timing import MOST_CALLS, PAUSE_S, SLOW_CALL_S, measure_in_turns, time_turn


class Clock:
    """Seconds that pass only when something takes time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def taking(self, *durations_ms: float):
        """Something that takes these times in turn, the last one ever after."""
        remaining = list(durations_ms)

        def run():
            self.now_s += (remaining.pop(0) if len(remaining) > 1 else remaining[0]) / 1000

        return run


def test_the_first_call_of_a_turn_does_not_count():
    clock = Clock()
    times_ms = time_turn(clock.taking(100.0, 15.0), clock=clock)
    assert times_ms == pytest.approx([15.0, 15.0])


def test_a_slow_call_is_made_once_and_counts():
    clock = Clock()
    assert time_turn(clock.taking(SLOW_CALL_S * 2000), clock=clock) == pytest.approx([SLOW_CALL_S * 2000])
    assert clock.now_s == pytest.approx(SLOW_CALL_S * 2)


def test_a_fast_model_is_called_many_times_and_not_forever():
    clock = Clock()
    assert 20 <= len(time_turn(clock.taking(1.0), clock=clock)) <= 21
    assert len(time_turn(lambda: None, clock=lambda: 0.0)) == MOST_CALLS


def test_sides_take_turns_in_every_round():
    clock, order = Clock(), []

    def side(name):
        wait = clock.taking(15.0)
        return lambda: (order.append(name), wait())

    pause = lambda seconds: order.append("." if seconds == PAUSE_S else "?")  # noqa: E731
    times_ms = measure_in_turns({"a": side("a"), "b": side("b")}, 2, clock=clock, sleep=pause)
    assert "".join(order) == ".aaa.bbb" * 2
    assert {name: len(each) for name, each in times_ms.items()} == {"a": 4, "b": 4}


def test_one_side_alone_needs_no_pause():
    pauses = []
    measure_in_turns({"a": lambda: None}, 3, clock=lambda: 0.0, sleep=pauses.append)
    assert pauses == []


def test_no_round_begins_after_the_deadline_and_one_is_always_measured():
    clock = Clock()
    times_ms = measure_in_turns({"a": clock.taking(600.0)}, 10, deadline_s=0.0, clock=clock)
    assert times_ms["a"] == pytest.approx([600.0])
