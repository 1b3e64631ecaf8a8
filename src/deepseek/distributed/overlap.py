"""How much of communication is exposed, i.e. makes the program wait, and how much hides behind computing.

    with ds.comm_overlap() as overlap:
        loss.backward()                      # DDP with `average_gradients(comm)` as its hook
    print(overlap.exposed_s, overlap.hidden_share)

`DeepSeekComm` tells every open meter of this process how long each collective took in its thread, and how long a
caller waited. Waiting for the buckets of a backward pass happens inside DDP, out of sight; it begins when the last
bucket is handed over, since nothing is left to compute then, and ends when the last reduction does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class OverlapMeter:
    """Seconds of communication inside a `comm_overlap` block, as far as it went.

    >>> meter = OverlapMeter(communication_s=4.0, exposed_s=1.0)
    >>> meter.hidden_s, meter.hidden_share
    (3.0, 0.75)
    """

    is_enabled: bool = True
    communication_s: float = 0.0
    exposed_s: float = 0.0
    num_collectives: int = 0

    @property
    def hidden_s(self) -> float:
        """Seconds of communication in which the program went on."""
        return max(self.communication_s - self.exposed_s, 0.0)

    @property
    def hidden_share(self) -> float:
        """Share of communication that hid behind computing; 1 where there was none."""
        return self.hidden_s / self.communication_s if self.communication_s else 1.0


_open_meters: list[OverlapMeter] = []
_lock = threading.Lock()


@contextmanager
def comm_overlap(enabled: bool = True) -> Iterator[OverlapMeter]:
    """Measure the communication of a block, and with `enabled=False` let gradients wait for it, to compare.

    >>> with comm_overlap() as overlap:
    ...     pass
    >>> overlap.exposed_s
    0.0
    """
    meter = OverlapMeter(enabled)
    with _lock:
        _open_meters.append(meter)
    try:
        yield meter
    finally:
        with _lock:
            _open_meters.remove(meter)


def is_overlapping() -> bool:
    """Whether gradients are reduced while others are computed; only a block with `enabled=False` says no."""
    return all(meter.is_enabled for meter in _open_meters)


def note_communication(seconds: float) -> None:
    """Count a collective that ran for so long."""
    with _lock:
        for meter in _open_meters:
            meter.communication_s += seconds
            meter.num_collectives += 1


def note_exposed(seconds: float) -> None:
    """Count seconds in which the program waited."""
    with _lock:
        for meter in _open_meters:
            meter.exposed_s += seconds
