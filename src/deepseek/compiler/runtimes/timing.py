"""Timing candidates so that a noisy machine disturbs them alike: in turns, each after a pause and an uncounted call.

A call after another candidate finds caches and frequencies as that one left them, and its threads still spinning for
work (ONNX Runtime's for 32 ms, those of OpenMP for 6), which is nobody's speed; each turn therefore begins with a pause
and with a call that does not count. Medians are reported and compared: a minimum rewards
luck, a mean punishes one interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
SHORTEST_TURN_S = 0.02
"""Calls of a turn are repeated for at least this long, so that a fast model is not timed by a few clock ticks."""
MOST_CALLS = 50
PAUSE_S = 0.05
"""Before each turn: by then the threads of the one before have gone to sleep."""
SLOW_CALL_S = 0.5
"""A first call that takes this long counts and is the turn: what another candidate left behind is not half a second."""


def measure_in_turns(
    sides: Mapping[K, Callable[[], object]],
    num_rounds: int,
    *,
    deadline_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[K, list[float]]:
    """Return the times in ms of each side over `num_rounds` rounds in which all take turns; at least one round is
    measured.

    No new round is begun after `deadline_s` (on `clock`).
    """
    times_ms: dict[K, list[float]] = {name: [] for name in sides}
    for index in range(num_rounds):
        if index > 0 and deadline_s is not None and clock() > deadline_s:
            break
        for name, run in sides.items():
            if len(sides) > 1:
                sleep(PAUSE_S)
            times_ms[name] += time_turn(run, clock=clock)
    return times_ms


def time_turn(run: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Return the times in ms of the calls of one turn, without the first unless it is slow.

    >>> len(time_turn(lambda: None)) > 1
    True
    """
    first_ms = time_call(run, clock=clock)
    if first_ms >= SLOW_CALL_S * 1000:
        return [first_ms]
    times_ms: list[float] = []
    began_s = clock()
    while len(times_ms) < MOST_CALLS and (not times_ms or clock() - began_s < SHORTEST_TURN_S):
        times_ms.append(time_call(run, clock=clock))
    return times_ms


def time_call(run: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the time in ms of one call."""
    began_s = clock()
    run()
    return (clock() - began_s) * 1000
