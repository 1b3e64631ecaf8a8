"""The memory of one recorded step, added up: bytes alive by kind over time, and who holds them at the peak."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from deepseek.train.allocations import KINDS, Recording

_NUM_HOLDERS = 12


@dataclass(frozen=True)
class MemoryHolder:
    """Memory of one kind that one module holds, or is held for it."""

    path: str
    kind: str
    num_bytes: int
    num_allocations: int
    lifetime_s: float
    """Median of its allocations."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes alive over one recorded step."""

    step: int
    duration_s: float
    """With the recording, which slows each operator down."""
    peak_bytes: int
    peak_s: float
    peak_by_kind: dict[str, int]
    holders: tuple[MemoryHolder, ...]
    """Those alive at the peak, the largest first."""
    points: tuple[tuple[float, tuple[int, ...]], ...]
    """Seconds, and the bytes of each of `KINDS` from then on."""
    phases: tuple[tuple[str, float], ...]
    allocator_peak_bytes: int | None
    """What torch's allocator had handed out at the most; none on a CPU, where it does not count."""


def summarize(step: int, recording: Recording, allocator_peak_bytes: int | None) -> StepMemory:
    """Add up what was alive when."""
    index_of = {kind: index for index, kind in enumerate(KINDS)}
    changes: list[tuple[float, int, int]] = []
    for one in recording.allocations:
        changes.append((one.begin_s, index_of[one.kind], one.num_bytes))
        if one.end_s is not None:
            changes.append((one.end_s, index_of[one.kind], -one.num_bytes))
    alive = [0] * len(KINDS)
    points: list[tuple[float, tuple[int, ...]]] = []
    for at_s, index, change in sorted(changes):
        alive[index] += change
        if points and points[-1][0] == at_s:
            points.pop()
        points.append((at_s, tuple(alive)))
    peak_s, peak = max(points, key=lambda point: sum(point[1]))
    groups = defaultdict(list)
    for one in recording.allocations:
        if one.begin_s <= peak_s and (one.end_s is None or one.end_s > peak_s):
            groups[one.path, one.kind].append(one)
    holders = []
    for (path, kind), group in groups.items():
        lives = [(recording.duration_s if one.end_s is None else one.end_s) - one.begin_s for one in group]
        num_bytes = sum(one.num_bytes for one in group)
        holders.append(MemoryHolder(path, kind, num_bytes, len(group), statistics.median(lives)))
    holders.sort(key=lambda holder: -holder.num_bytes)
    return StepMemory(
        step=step,
        duration_s=recording.duration_s,
        peak_bytes=sum(peak),
        peak_s=peak_s,
        peak_by_kind=dict(zip(KINDS, peak, strict=True)),
        holders=tuple(holders[:_NUM_HOLDERS]),
        points=tuple(points),
        phases=tuple(recording.phases),
        allocator_peak_bytes=allocator_peak_bytes,
    )
