"""Which lengths to compile for, and which rows of a batch to run together: pure arithmetic on lengths.

`dynamic_graph` counts the lengths that arrive and asks three questions here. Which boundaries should be compiled for?
`choose_boundaries` minimises

    sum over lengths l of  count(l) * (cost(boundary above l) - cost(l))   +   number of boundaries * compile cost

exactly. Is a new answer worth leaving the old one for? `is_worth_replanning` says no unless the saving pays for the new
compilations and a margin on top, so that a plan does not swing with every batch. And how should the rows of one batch
be grouped? `group_rows` cuts the sorted lengths into runs, each padded to its own longest row, at the least cost.

Costs come from `cost_fit.py`, least squares over times that were measured. Because a cost never falls with length, the
cost of a run of lengths obeys the quadrangle inequality (Yao 1980), so each layer of the dynamic program is solved by
divide and conquer: K boundaries out of n lengths cost O(K n log n), 3 ms for 8 out of 500.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deepseek.core.errors import ConfigError

Way = str | int  # how a piece is compiled: with symbols for lengths, or for one boundary
SYMBOLIC = "symbolic"
# A new plan must save this share of what the old one costs; between the two nothing changes.
REPLAN_MARGIN = 0.1
# Batches that a plan stays in force at least.
REPLAN_PATIENCE = 256
# Cuts are looked for at this many lengths of one batch at most, which keeps grouping under a millisecond.
_MAX_CUTS = 48


@dataclass(frozen=True)
class Cost:
    """Seconds for `rows` rows of `length` each: `overhead + token * rows * length + pair * rows * length**2`."""

    overhead: float
    token: float
    pair: float

    def __call__(self, rows: float, length: float) -> float:
        return self.overhead + rows * length * (self.token + self.pair * length)


# Until something is measured: tokens cost one unit, pairs as in a layer 500 wide, a call as much as 64 tokens.
ASSUMED_COST = Cost(overhead=64.0, token=1.0, pair=1 / 1000)


@dataclass(frozen=True)
class BoundaryPlan:
    """Boundaries, and what they are expected to cost: padding and compiling, in the unit of the cost that was given."""

    boundaries: tuple[int, ...]
    padding_cost: float
    compile_cost: float

    @property
    def cost(self) -> float:
        return self.padding_cost + self.compile_cost


def choose_boundaries(
    counts: Mapping[int, float], *, max_buckets: int, cost: Callable[[int], float], compile_cost: float = 0.0
) -> BoundaryPlan:
    """Return the at most `max_buckets` boundaries with the least padding and compile cost for lengths seen `counts`
    times.

    `cost(length)` is what one unit of that length costs and must not fall with length. Every boundary is a length that
    was seen, and the longest one is always among them. Raises `ConfigError` for no lengths, or no buckets.

    >>> choose_boundaries({8: 90, 10: 5, 64: 5}, max_buckets=2, cost=float).boundaries
    (10, 64)
    >>> choose_boundaries({8: 90, 10: 5, 64: 5}, max_buckets=3, cost=float, compile_cost=1000).boundaries
    (10, 64)
    """
    lengths = sorted(length for length, count in counts.items() if count > 0)
    if not lengths or max_buckets < 1:
        raise ConfigError(
            f"{len(lengths)} lengths and {max_buckets} buckets give no plan; give at least one length and one bucket"
        )
    totals = list(itertools.accumulate((counts[length] for length in lengths), initial=0.0))
    own = math.fsum(counts[length] * cost(length) for length in lengths)
    costs = [cost(length) for length in lengths]
    best: BoundaryPlan | None = None
    for boundaries, padded in _layers(lengths, totals, costs, min(max_buckets, len(lengths))):
        plan = BoundaryPlan(boundaries, max(0.0, padded - own), len(boundaries) * compile_cost)
        if best is None or plan.cost < best.cost:
            best = plan
    assert best is not None
    return best


def bucket_of(length: int, boundaries: Sequence[int]) -> int | None:
    """Return the smallest boundary that holds `length`, or `None` when it is longer than all of them.

    >>> bucket_of(9, (8, 16)), bucket_of(16, (8, 16)), bucket_of(17, (8, 16))
    (16, 16, None)
    """
    index = bisect_left(boundaries, length)
    return boundaries[index] if index < len(boundaries) else None


def padding_share(counts: Mapping[int, float], boundaries: Sequence[int]) -> float:
    """Return which share of the positions that run is padding; lengths above all boundaries run unpadded.

    >>> padding_share({4: 1, 8: 1}, (8,))
    0.25
    """
    real = sum(length * count for length, count in counts.items())
    run = sum((bucket_of(length, boundaries) or length) * count for length, count in counts.items())
    return 1 - real / run if run else 0.0


def padding_cost(counts: Mapping[int, float], boundaries: Sequence[int], cost: Callable[[int], float]) -> float:
    """Return the cost of padding to `boundaries` over all of `counts`."""
    return math.fsum(
        count * (cost(bucket_of(length, boundaries) or length) - cost(length)) for length, count in counts.items()
    )


def is_worth_replanning(
    old: Sequence[int],
    new: BoundaryPlan,
    counts: Mapping[int, float],
    *,
    cost: Callable[[int], float],
    compile_cost: float,
    batches_since: int,
    margin: float = REPLAN_MARGIN,
    patience: int = REPLAN_PATIENCE,
) -> bool:
    """Return whether to leave the boundaries `old` for `new`: never before `patience` batches, and then only for a real
    gain.

    Over a future like `counts`, the padding saved must pay for compiling the boundaries that are new, and exceed
    `margin` of all that running under the old plan costs. A length longer than every old boundary is no reason by
    itself: it runs with symbolic lengths until it is frequent enough to pay.
    """
    if batches_since < patience or tuple(old) == new.boundaries:
        return False
    running = math.fsum(count * cost(bucket_of(length, old) or length) for length, count in counts.items())
    num_new = len(set(new.boundaries) - set(old))
    saved = padding_cost(counts, old, cost) - new.padding_cost
    return saved > num_new * compile_cost + margin * running


def group_rows(lengths: Sequence[int], cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut the ascending `lengths` into runs `[start, stop)`, each run at its longest length, at the least cost.

    `cost(rows, length)` must not fall with either. Cutting happens between different lengths only.

    >>> group_rows([3, 3, 4, 90], lambda rows, length: 10 + rows * length)
    [(0, 3), (3, 4)]
    >>> group_rows([3, 3, 4, 90], lambda rows, length: 1000 + rows * length)
    [(0, 4)]
    """
    cuts = _cuts(lengths)
    best, came_from = [0.0], [0]
    for stop in range(1, len(cuts)):
        length = lengths[cuts[stop] - 1]
        options = [best[start] + cost(cuts[stop] - cuts[start], length) for start in range(stop)]
        chosen = min(range(stop), key=options.__getitem__)
        best.append(options[chosen])
        came_from.append(chosen)
    return [(cuts[start], cuts[stop]) for start, stop in _walk_back(came_from)]


def _layers(
    lengths: Sequence[int], totals: Sequence[float], costs: Sequence[float], max_buckets: int
) -> list[tuple[tuple[int, ...], float]]:
    """For each number of buckets, the best boundaries and the total cost of running everything padded to them."""

    def run(start: int, stop: int) -> float:
        return (totals[stop] - totals[start]) * costs[stop - 1]

    size = len(lengths)
    best = [0.0] + [math.inf] * size
    choices: list[list[int]] = []
    answers = []
    for _ in range(max_buckets):
        best, choice = _next_layer(best, run)
        choices.append(choice)
        stops, stop = [], size
        for row in reversed(choices):
            stops.append(stop)
            stop = row[stop]
        answers.append((tuple(lengths[stop - 1] for stop in reversed(stops)), best[size]))
    return answers


def _next_layer(best: Sequence[float], run: Callable[[int, int], float]) -> tuple[list[float], list[int]]:
    """One more bucket: for every stop the best start, which never moves left as the stop moves right."""
    size = len(best) - 1
    values, choice = [math.inf] * (size + 1), [0] * (size + 1)
    spans = [(1, size, 0, size - 1)]
    while spans:
        low, high, first, last = spans.pop()
        if low > high:
            continue
        middle = (low + high) // 2
        options = range(first, min(last, middle - 1) + 1)
        chosen = min(options, key=lambda start: best[start] + run(start, middle))
        values[middle], choice[middle] = best[chosen] + run(chosen, middle), chosen
        spans += [(low, middle - 1, first, chosen), (middle + 1, high, chosen, last)]
    return values, choice


def _cuts(lengths: Sequence[int]) -> list[int]:
    """Return where a run may end: between different lengths; of too many such indices, evenly spread ones."""
    indices = [index for index in range(1, len(lengths)) if lengths[index] != lengths[index - 1]]
    if len(indices) > _MAX_CUTS:
        indices = [indices[index * len(indices) // _MAX_CUTS] for index in range(_MAX_CUTS)]
    return [0, *indices, len(lengths)]


def _walk_back(came_from: Sequence[int]) -> list[tuple[int, int]]:
    pairs, stop = [], len(came_from) - 1
    while stop > 0:
        pairs.append((came_from[stop], stop))
        stop = came_from[stop]
    return pairs[::-1]
