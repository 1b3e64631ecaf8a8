"""At which lengths pieces run: learned from what arrives and how long it takes. No tensors here.

A `LengthPlanner` counts the lengths that come in and times the pieces that run. From the times it fits what a piece
costs; from lengths and costs it plans boundaries, tries one of them against symbols in turns (`Trial`), and adopts them
where they pay for their compilations. The arithmetic of boundaries and groups is in `buckets.py`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from deepseek.compiler.dynamic_shapes.buckets import (
    ASSUMED_COST,
    REPLAN_PATIENCE,
    SYMBOLIC,
    Cost,
    Way,
    bucket_of,
    choose_boundaries,
    is_worth_replanning,
)
from deepseek.compiler.dynamic_shapes.cost_fit import fit_cost

Strategy = Literal["auto", "symbolic", "bucketed"]
# Calls after which boundaries are planned, and after which auto tries one.
_PLAN_AFTER = 16
_TRY_AFTER = 64
# Groups that each side of a trial runs, the first of which compiles; and how much faster a boundary must be.
_TRIAL_GROUPS = 9
_TRIAL_GAIN = 1.1
# What compiling for a trial may cost, of the time spent running so far.
_TRIAL_SHARE = 0.05
# Times that the cost of a group is fitted to.
_FIT_AFTER, _MAX_SAMPLES = 64, 512


@dataclass
class Counts:
    """Counts of what came in and what ran, in calls and in positions."""

    calls: int = 0
    pieces: int = 0
    real: int = 0
    run: int = 0
    arrived: int = 0
    lengths: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Piece:
    """A part of a batch that runs by itself, `length` long where its longest row is `longest`."""

    rows: int
    length: int
    longest: int
    way: Way


@dataclass(frozen=True)
class CompilationState:
    """The state of compilations that the planner decides by."""

    num_left: int
    """How many more are allowed."""
    ways: frozenset[Way]
    """Ways that have compiled code."""
    seconds: float
    """Seconds that one compilation takes."""


@dataclass
class Trial:
    """One boundary against symbols, in turns: seconds per position of each."""

    lowest: int
    boundary: int
    boundaries: tuple[int, ...]
    seconds: dict[Way, list[float]]

    def next_way(self, length: int) -> Way:
        """Return the side whose turn it is; lengths of other buckets have no part in it."""
        if not self.lowest < length <= self.boundary:
            return SYMBOLIC
        return min(self.seconds, key=lambda way: len(self.seconds[way]))

    @property
    def is_over(self) -> bool:
        return all(len(timings) >= _TRIAL_GROUPS for timings in self.seconds.values())

    @property
    def gain(self) -> float:
        symbolic, static = (statistics.median(self.seconds[way][1:]) for way in (SYMBOLIC, self.boundary))
        return symbolic / static


class LengthPlanner:
    """Boundaries for one compiled function, as they are learned.

    >>> planner = LengthPlanner("bucketed", boundaries=(8, 16))
    >>> planner.find_way(5), planner.find_way(40)
    ((8, 8), (40, 'symbolic'))
    """

    def __init__(self, strategy: Strategy, *, boundaries: Sequence[int] = (), cost: Cost | None = None) -> None:
        self.strategy, self.is_given = strategy, bool(boundaries)
        self.counts = Counts()
        self.boundaries = tuple(sorted(boundaries))
        self.reason = "no boundary has been tried"
        self.trial: Trial | None = None
        self._cost = cost
        self._samples: list[tuple[int, int, float]] = []
        self._planned_at, self._has_tried = 0, False

    @property
    def wants_times(self) -> bool:
        """Return whether pieces are still to be timed."""
        return self.trial is not None or len(self._samples) < _MAX_SAMPLES

    @property
    def has_cost(self) -> bool:
        """Return whether costs are known, in seconds unless they were given."""
        return self._cost is not None

    def count(self, lengths: Sequence[int], num_positions: int) -> None:
        """Take note of a call's lengths, and of the positions that it came with."""
        self.counts.lengths.update(lengths)
        self.counts.real += sum(lengths)
        self.counts.arrived += num_positions

    def note(self, piece: Piece, seconds: float, look: Callable[[], CompilationState]) -> None:
        """Keep the time of a piece, for the cost and for the trial."""
        if len(self._samples) < _MAX_SAMPLES and piece.way == SYMBOLIC:
            self._samples.append((piece.rows, piece.length, seconds))
        if self.trial is not None and self.trial.lowest < piece.longest <= self.trial.boundary:
            self.trial.seconds[piece.way].append(seconds / piece.rows / piece.longest)
            if self.trial.is_over:
                self._end_trial(self.trial, look())

    def group_cost(self, rows: int, length: int) -> float:
        """Return the cost of a group of rows whose longest row has `length`."""
        return (self._cost or ASSUMED_COST)(rows, bucket_of(length, self.boundaries) or length)

    def find_way(self, length: int) -> tuple[int, Way]:
        """Return how long a piece is run, and by which code. A length of one is avoided: torch compiles it
        separately."""
        if self.trial is not None:
            way = self.trial.next_way(length)
            return (self.trial.boundary, way) if way != SYMBOLIC else (max(2, length), SYMBOLIC)
        boundary = bucket_of(length, self.boundaries)
        return (max(2, length), SYMBOLIC) if boundary is None else (boundary, boundary)

    def plan(self, look: Callable[[], CompilationState]) -> None:
        """Fit the cost once there are times; plan, try and replan boundaries when it is time for that."""
        if self._cost is None and len(self._samples) >= _FIT_AFTER:
            self._cost = fit_cost(self._samples)
        if self.strategy == "symbolic" or self.is_given or self.trial is not None:
            return
        calls = self.counts.calls
        if self.strategy == "auto" and not self.boundaries:
            if calls >= _TRY_AFTER and self._cost is not None and not self._has_tried:
                compiled = look()
                if compiled.num_left > 1 and compiled.seconds < _TRIAL_SHARE * self._spent_s:
                    self._start_trial(compiled)
        elif calls >= _PLAN_AFTER and (not self.boundaries or calls - self._planned_at >= REPLAN_PATIENCE):
            self._replan(look())

    def _replan(self, compiled: CompilationState) -> None:
        """Move to other boundaries where that pays for compiling them."""
        room = compiled.num_left + len(compiled.ways & set(self.boundaries))
        if room < 1:
            return
        counts, cost = self.counts.lengths, self._length_cost
        plan = choose_boundaries(counts, max_buckets=room, cost=cost, compile_cost=compiled.seconds)
        since = self.counts.calls - self._planned_at
        if not self.boundaries or is_worth_replanning(
            self.boundaries, plan, counts, cost=cost, compile_cost=compiled.seconds, batches_since=since
        ):
            self.boundaries, self.reason = plan.boundaries, f"planned from {counts.total()} lengths"
        self._planned_at = self.counts.calls

    def _start_trial(self, compiled: CompilationState) -> None:
        """Try the boundary under which most of the work would run."""
        counts = self.counts.lengths
        plan = choose_boundaries(
            counts, max_buckets=compiled.num_left, cost=self._length_cost, compile_cost=compiled.seconds
        )
        work: Counter[int] = Counter()
        for length, count in counts.items():
            work[bucket_of(length, plan.boundaries) or length] += length * count
        boundary = work.most_common(1)[0][0]
        lowest = max((smaller for smaller in plan.boundaries if smaller < boundary), default=0)
        self._has_tried = True
        self.trial = Trial(lowest, boundary, plan.boundaries, {SYMBOLIC: [], boundary: []})

    def _end_trial(self, trial: Trial, compiled: CompilationState) -> None:
        """Adopt the boundaries if the one that was tried is faster, padding included, and the rest will pay."""
        self.trial, gain = None, trial.gain
        price_s = compiled.seconds * (len(trial.boundaries) - 1)
        won_s = self._spent_s * (1 - 1 / gain)
        tried = f"boundary {trial.boundary} ran at {gain:.2f} times the speed of symbols"
        if gain < _TRIAL_GAIN:
            self.reason = tried
        elif won_s < price_s:
            self.reason = f"{tried}, which would win {won_s:.1f} s and cost {price_s:.1f} s to compile"
        else:
            self.boundaries, self._planned_at = trial.boundaries, self.counts.calls
            self.reason = tried

    def _length_cost(self, length: int) -> float:
        cost = self._cost or ASSUMED_COST
        return cost(1, length) - cost.overhead

    @property
    def _spent_s(self) -> float:
        """Return the seconds that all calls so far have run, about."""
        if not self._samples:
            return 0.0
        return statistics.fmean(seconds for *_, seconds in self._samples) * self.counts.pieces
