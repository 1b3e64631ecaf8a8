"""What this rank called of the collectives, in order: sequence number, operation, shape, dtype, bytes, file and line.

`DeepSeekComm` begins a `CollectiveCall` before it enters a collective and ends it after; `hang_doctor.py` publishes the
last ones, and `communication_metrics.py` renders the sums. All of it is a few assignments of Python (the share of a
1 MiB all-reduce is measured by `benchmarks/collectives.py`), and nothing leaves the process here.

Sequence numbers are counted per group, since that is the order in which the ranks of a group have to agree.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

LATENCY_BOUNDS_S = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_NUM_KEPT = 4096
_OWN_FOLDER = str(Path(__file__).parent)


class CollectiveCall:
    """One call of a collective on this rank; `ended_s` is `None` while it is in flight."""

    __slots__ = ("began_s", "dtype", "ended_s", "group", "num_bytes", "operation", "sequence", "shape", "site")

    def __init__(
        self, group: str, sequence: int, operation: str, shape: tuple[int, ...], dtype: str, num_bytes: int, site: str
    ) -> None:
        self.group = group
        self.sequence = sequence
        self.operation = operation
        self.shape = shape
        self.dtype = dtype
        self.num_bytes = num_bytes
        self.site = site
        self.began_s = time.perf_counter()
        self.ended_s: float | None = None

    @property
    def signature(self) -> tuple[str, tuple[int, ...], str]:
        """What all ranks of the group have to agree on."""
        return self.operation, self.shape, self.dtype

    def to_list(self) -> list[Any]:
        """Return what other ranks need to know of it, as JSON takes it."""
        is_ended = self.ended_s is not None
        return [self.group, self.sequence, self.operation, list(self.shape), self.dtype, self.site, is_ended]


class LatencyHistogram:
    """Seconds of calls, counted by upper bound."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one call."""
        self.counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.total_s += seconds


class CollectiveLedger:
    """The calls of one rank, newest last, and their sums.

    >>> ledger = CollectiveLedger()
    >>> call = ledger.begin("world", "all_reduce", (4,), "float32", 16)
    >>> ledger.end(call, {"inside": 16})
    >>> call.sequence, call.ended_s is not None, ledger.sent_bytes["all_reduce", "inside"]
    (1, True, 16)
    """

    def __init__(self) -> None:
        self.calls: deque[CollectiveCall] = deque(maxlen=_NUM_KEPT)
        self.latencies: dict[str, LatencyHistogram] = defaultdict(LatencyHistogram)
        self.sent_bytes: dict[tuple[str, str], int] = defaultdict(int)
        self._sequences: dict[str, int] = defaultdict(int)

    def begin(self, group: str, operation: str, shape: tuple[int, ...], dtype: str, num_bytes: int) -> CollectiveCall:
        """Note that a collective is entered now, by the nearest line outside this room."""
        self._sequences[group] += 1
        site = find_site(sys._getframe(1))
        call = CollectiveCall(group, self._sequences[group], operation, shape, dtype, num_bytes, site)
        self.calls.append(call)
        return call

    def end(self, call: CollectiveCall, sent_bytes: Mapping[str, int]) -> None:
        """Note that it is done, and the bytes that this rank sent by class of link."""
        call.ended_s = time.perf_counter()
        self.latencies[call.operation].observe(call.ended_s - call.began_s)
        for link, num_bytes in sent_bytes.items():
            self.sent_bytes[call.operation, link] += num_bytes


def find_site(frame: FrameType | None) -> str:
    """Return `file:line` of the nearest frame that is neither of this room nor of torch."""
    outermost = frame
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN_FOLDER) and f"{_SEPARATOR}torch{_SEPARATOR}" not in name and name[0] != "<":
            return f"{name}:{frame.f_lineno}"
        outermost, frame = frame, frame.f_back
    return f"{outermost.f_code.co_filename}:{outermost.f_lineno}" if outermost else "nowhere"


_SEPARATOR = "/" if "/" in _OWN_FOLDER else "\\"
