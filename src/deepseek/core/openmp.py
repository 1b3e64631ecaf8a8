"""Threads of OpenMP that spin for a partner while cores are free, and sleep soon while others want them.

At the end of each parallel loop every thread waits for the slowest. GNU's runtime spins 300,000 times before it sleeps.
On cores of one's own that is right: to wake a sleeper of a virtual machine takes so long that training and decoding ran
at half of their speed with a bound of 1,000. Where another program holds the partner's core, spinning is time in which
nobody works, and a training loop fell to a twentieth of its speed beside four busy processes.

So a thread watches how long this process's threads stand in the kernel's queue for a core, and while that is much makes
the runtime stop spinning. It does so by a rule that GNU documents under `GOMP_SPINCOUNT`: while there are more OpenMP
threads than processors, waits spin 100 times. One more team of threads, all of it asleep, makes them more. Nothing else
changes, least of all the number of threads that share a sum, so that results stay equal to the bit. Intel's and LLVM's
runtimes know no such rule and get a bound in milliseconds when they are loaded.

The command line calls `yield_cores`, the library never does; `python -m benchmarks.under_load` measures what it brings.
A server must step its model in the one thread that ever ran parallel loops, or it has a second team all the time.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SPIN_BOUNDS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""Bounds on spinning for a machine that is always shared: GNU's runtime counts spins, others milliseconds."""
_SPOKEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # whoever sets one of these has said how to wait
_THREADS = Path("/proc/self/task")
_PERIOD_S = 0.25
_LEAST_NS = int(0.1e9 * _PERIOD_S)  # a process that wants a core for less than a tenth of the time is idle
_GRAIN = 1 << 15  # elements of an elementwise kernel that torch gives one thread


@dataclass(frozen=True)
class Waited:
    """Nanoseconds that the kernel counts for one thread: on a core, and ready to run but waiting for one."""

    ran_ns: int
    waited_ns: int


class YieldPolicy:
    """When to stop spinning: once threads have waited for cores twice in a row, and no longer once they have not for a
    while. A short burst of somebody else's work costs less than sleeping through all that follows it.

    >>> policy = YieldPolicy()
    >>> [policy.decide(share) for share in (0.0, 0.3, 0.3, 0.02, 0.02, 0.02, 0.02)]
    [False, False, True, True, True, True, False]
    """

    CONTENDED = 0.25
    CALM = 0.05
    NUM_CONTENDED = 2
    NUM_CALM = 4

    def __init__(self) -> None:
        self._is_yielding = False
        self._num_contended = self._num_calm = 0

    def decide(self, waiting_share: float) -> bool:
        """Return whether to yield from now on; `waiting_share` is waiting over waiting and running, 0 to 1."""
        self._num_contended = self._num_contended + 1 if waiting_share > self.CONTENDED else 0
        self._num_calm = self._num_calm + 1 if waiting_share < self.CALM else 0
        if self._num_contended >= self.NUM_CONTENDED:
            self._is_yielding = True
        elif self._num_calm >= self.NUM_CALM:
            self._is_yielding = False
        return self._is_yielding


def read_waits(folder: Path = _THREADS) -> dict[str, Waited]:
    """Return what the kernel has counted for each thread of this process; empty where it does not count."""
    counted: dict[str, Waited] = {}
    for thread in folder.iterdir() if folder.is_dir() else ():
        try:
            ran_ns, waited_ns, _ = map(int, (thread / "schedstat").read_text().split())
        except (OSError, ValueError):  # the thread has ended, or the kernel counts nothing
            continue
        counted[thread.name] = Waited(ran_ns, waited_ns)
    return counted


def share_waited(before: Mapping[str, Waited], after: Mapping[str, Waited]) -> float:
    """Return the share of the time between two readings that threads waited for cores; 0 where they hardly wanted any.

    >>> share_waited({"1": Waited(5 * 10**7, 0)}, {"1": Waited(8 * 10**7, 10**7), "2": Waited(5 * 10**7, 10**7)})
    0.2
    """
    nothing = Waited(0, 0)
    waited = sum(now.waited_ns - before.get(thread, nothing).waited_ns for thread, now in after.items())
    ran = sum(now.ran_ns - before.get(thread, nothing).ran_ns for thread, now in after.items())
    return waited / (waited + ran) if waited + ran >= _LEAST_NS else 0.0


class SleepingTeam:
    """A team of OpenMP threads that does nothing; while it is there, GNU's runtime hardly spins."""

    def __init__(self) -> None:
        self._dismissed: threading.Event | None = None
        self._leader: threading.Thread | None = None

    def set_present(self, is_wanted: bool) -> None:
        """Have the team, or dismiss it."""
        if is_wanted and self._leader is None:
            self._dismissed = threading.Event()
            self._leader = threading.Thread(target=_lead_team, args=(self._dismissed,), daemon=True)
            self._leader.start()
        elif not is_wanted and self._leader is not None and self._dismissed is not None:
            self._dismissed.set()
            self._leader.join()  # with it its team ends
            self._leader = None


def _lead_team(dismissed: threading.Event) -> None:
    import torch

    torch.ones(_GRAIN * torch.get_num_threads()).add_(1)  # a parallel loop: each thread of the process has its team
    dismissed.wait()


def yield_cores() -> bool:
    """Let OpenMP's threads sleep soon whenever others want their cores, from now on; return whether that is watched.

    It is not where the user has said how to wait (`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`), nor where the kernel does not
    count how long threads wait (anything but Linux). Call it before torch is loaded: other runtimes than GNU's read
    their bound then.

    >>> yield_cores() in (True, False)
    True
    """
    if any(name in os.environ for name in _SPOKEN):
        return False
    if "torch" not in sys.modules:
        os.environ.setdefault("KMP_BLOCKTIME", SPIN_BOUNDS["KMP_BLOCKTIME"])
    if not read_waits():
        return False
    threading.Thread(target=_watch, name="yield-cores", daemon=True).start()
    return True


def _watch() -> None:
    policy, team, before = YieldPolicy(), SleepingTeam(), read_waits()
    pause = threading.Event()
    while not pause.wait(_PERIOD_S):
        after = read_waits()
        is_contended = policy.decide(share_waited(before, after))
        before = after
        if "torch" in sys.modules:
            team.set_present(is_contended)
