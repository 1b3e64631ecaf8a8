"""Which segments of a model to run again in the backward pass, so that what is kept fits a budget.

Pure policy. A forward pass runs segments one after the other. For its backward pass a segment needs its input, and
what it computes inside; the inside is either kept or computed a second time. Backward passes run in reverse, so when
segment i is at work, the kept parts of the segments before it are still there, and those behind it are gone. The most
that is there at once is therefore, over all i: what is kept before i, the input of i and its inside.

`choose` minimizes the time of what runs twice under that condition. It walks the segments and keeps, after each, every
choice for which no other keeps fewer bytes in less time (a knapsack by dominance, exact). Where more than
`MAX_CHOICES` remain, bytes are rounded up to a grid, which may miss the best choice and never breaks the budget.
The sqrt(n) rule (Chen et al., arXiv:1604.06174) is what comes out for equal segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from deepseek.core.errors import ConfigError

MAX_CHOICES = 4096


@dataclass(frozen=True)
class Segment:
    """One part of a forward pass, as measured."""

    name: str
    time_s: float
    """Of its forward pass."""
    input_bytes: int
    """Its input, which is kept either way."""
    inside_bytes: int
    """Bytes that its backward pass needs beyond that."""


@dataclass(frozen=True)
class Choice:
    """The segments to run again, with the cost and the benefit."""

    recomputed: tuple[str, ...]
    extra_time_s: float
    peak_bytes: int
    """The most that is kept at once, for all segments and what is outside of them."""
    is_exact: bool = True
    """Whether no choice within the budget takes less time."""


@dataclass(frozen=True)
class _Partial:
    kept_bytes: int
    time_s: float
    peak_bytes: int
    recomputed: tuple[int, ...]


def choose(segments: Sequence[Segment], budget_bytes: int, *, outside_bytes: int = 0) -> Choice:
    """Return the choice that takes the least extra time among those that keep at most `budget_bytes` at once.

    `outside_bytes` are kept by what surrounds the segments. Raises `ConfigError` where even recomputing everything
    needs more, and says how much.

    >>> layers = [Segment("a", 1.0, 10, 100), Segment("b", 3.0, 10, 100)]
    >>> choose(layers, 150).recomputed
    ('a',)
    """
    partials, is_exact = [_Partial(outside_bytes, 0.0, outside_bytes, ())], True
    for index, segment in enumerate(segments):
        following = [extended for partial in partials for extended in _extend(partial, index, segment, budget_bytes)]
        if not following:
            least = smallest_peak(segments, outside_bytes=outside_bytes)
            raise ConfigError(
                f"the budget of {budget_bytes:,} bytes cannot be met: {least:,} are needed even if every segment is "
                "run again; raise the budget or split the segments"
            )
        partials = _drop_dominated(following)
        if len(partials) > MAX_CHOICES:
            partials, is_exact = _coarsen(partials, budget_bytes), False
    best = min(partials, key=lambda partial: (partial.time_s, partial.peak_bytes))
    names = tuple(segments[index].name for index in best.recomputed)
    return Choice(names, best.time_s, best.peak_bytes, is_exact)


def find_peak(segments: Sequence[Segment], recomputed: Sequence[str], *, outside_bytes: int = 0) -> int:
    """Return the most bytes kept at once when the segments named are run again."""
    kept = peak = outside_bytes
    for segment in segments:
        peak = max(peak, kept + segment.input_bytes + segment.inside_bytes)
        kept += segment.input_bytes + (0 if segment.name in recomputed else segment.inside_bytes)
    return max(peak, kept)


def smallest_peak(segments: Sequence[Segment], *, outside_bytes: int = 0) -> int:
    """Return the fewest bytes that any choice keeps at once."""
    return find_peak(segments, [segment.name for segment in segments], outside_bytes=outside_bytes)


def _extend(partial: _Partial, index: int, segment: Segment, budget_bytes: int) -> Iterator[_Partial]:
    during = partial.kept_bytes + segment.input_bytes + segment.inside_bytes
    if during > budget_bytes:
        return
    peak = max(partial.peak_bytes, during)
    yield _Partial(during, partial.time_s, peak, partial.recomputed)
    kept = partial.kept_bytes + segment.input_bytes
    yield _Partial(kept, partial.time_s + segment.time_s, peak, (*partial.recomputed, index))


def _drop_dominated(partials: list[_Partial]) -> list[_Partial]:
    """Return the partial choices that no other one beats in kept bytes, time and peak so far."""
    ordered = sorted(partials, key=lambda partial: (partial.kept_bytes, partial.time_s, partial.peak_bytes))
    remaining: list[_Partial] = []
    for partial in ordered:
        if not remaining or partial.time_s < remaining[-1].time_s:
            remaining.append(partial)
    return remaining


def _coarsen(partials: list[_Partial], budget_bytes: int) -> list[_Partial]:
    """Return at most `MAX_CHOICES`: the fastest of those whose kept bytes round up to the same number."""
    step = -(-budget_bytes // MAX_CHOICES)
    by_cell: dict[int, _Partial] = {}
    for partial in partials:
        cell = -(-partial.kept_bytes // step)
        if cell not in by_cell or partial.time_s < by_cell[cell].time_s:
            by_cell[cell] = partial
    chosen = list(by_cell.values())
    assert all(one.kept_bytes <= two.kept_bytes for one, two in pairwise(chosen))
    return chosen
