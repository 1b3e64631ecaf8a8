"""Why a collective hangs: which rank never entered it, where that rank is instead, and who waits where.

Every rank publishes the last lines of its ledger to a side store (TCP or file, not the collectives' own connections)
from a thread, when they changed and as a sign of life. That is off the hot path. Two things read it:

    check(call)      before a call of a kind that this rank has not made from that line yet: it waits until the next
                     rank of the group has published the same number of call and compares operation, shape and dtype.
                     A mismatch is raised before any byte of it is on the wire, where gloo would hang, add up garbage
                     or abort the process. A loop pays for it in its first step.
    explain(call)    after a call failed or ran into its timeout: it reads all ranks and returns the error to raise.

NCCL's flight recorder covers its own kernels; `read_flight_recorder` adds its text where there is one.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from deepseek.core.errors import CollectiveMismatchError, CommunicationError, DeepSeekError
from deepseek.distributed.collective_ledger import CollectiveCall, CollectiveLedger, find_site

LOOK_EVERY_S = 0.2
SIGN_OF_LIFE_S = 1.0
_NUM_PUBLISHED = 16
_MOST_KINDS_PER_SITE = 64
_FIRST_POLL_S, _LONGEST_POLL_S = 0.0005, 0.02


@dataclass(frozen=True)
class RankState:
    """What a rank last published of itself."""

    rank: int
    beat: int
    state: str
    location: str
    calls: tuple[tuple[str, int, str, tuple[int, ...], str, str, bool], ...]

    def find_call(self, group: str, sequence: int) -> tuple[str, tuple[int, ...], str, str] | None:
        """Operation, shape, dtype and site of a call that it has entered, or `None`."""
        for name, number, operation, shape, dtype, site, _ in self.calls:
            if (name, number) == (group, sequence):
                return operation, shape, dtype, site
        return None

    def find_last(self, group: str) -> int:
        """The number of its last call in a group, of those that it published; 0 for none."""
        return max((number for name, number, *_ in self.calls if name == group), default=0)


class HangDoctor:
    """Publishes this rank's ledger to `store`, and reads those of others when a collective is new, late or broken."""

    def __init__(self, store: Store, rank: int, ledger: CollectiveLedger, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._ledger = ledger
        self._timeout_s = timeout_s
        self._state = "running"
        self._beat = 0
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._kinds: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
        self.lost_store: str | None = None
        self._publish()
        self._thread = threading.Thread(target=self._watch, name="deepseek-hang-doctor", daemon=True)
        self._thread.start()

    def check(self, call: CollectiveCall, ranks: Sequence[int]) -> None:
        """Compare a call of a kind not seen from its line before with what the next rank of the group calls."""
        kinds = self._kinds[call.site]
        kind = (call.group, *call.signature)
        if kind in kinds or len(kinds) >= _MOST_KINDS_PER_SITE:
            return
        self._publish()
        neighbor = ranks[(ranks.index(self._rank) + 1) % len(ranks)]
        other = self._wait_for(neighbor, call, ranks)
        if other is not None and other[:3] != call.signature:
            raise self._describe_mismatch(call, neighbor, other)
        kinds.add(kind)

    def explain(self, call: CollectiveCall, ranks: Sequence[int], error: BaseException) -> DeepSeekError:
        """Return what to raise for a call that failed with `error`."""
        try:
            self._publish()
            before = {rank: self._read(rank) for rank in ranks}
            time.sleep(SIGN_OF_LIFE_S + 3 * LOOK_EVERY_S)
            after = {rank: self._read(rank) for rank in ranks}
        except (dist.DistError, RuntimeError) as lost:
            self.lost_store = str(lost).splitlines()[0]
            return CommunicationError(
                f"{describe_call(call)} failed on rank {self._rank}, and the store that ranks report to is gone, so "
                f"the process that holds it (rank 0, or the launcher's agent) ended: {first_sentence(error)}"
            )
        for rank, state in after.items():
            other = state.find_call(call.group, call.sequence)
            if other is not None and other[:3] != call.signature:
                return self._describe_mismatch(call, rank, other)
        return self._fail(CommunicationError(self._report(call, before, after, error)))

    def close(self, state: str) -> None:
        """Publish how this rank left, and stop."""
        self._state = state
        self._is_stopped.set()
        self._thread.join()
        if self.lost_store is None:
            try:
                self._publish()
            except (dist.DistError, RuntimeError) as lost:
                self.lost_store = str(lost)

    def _watch(self) -> None:
        seen, told_s = None, time.monotonic()
        while not self._is_stopped.wait(LOOK_EVERY_S):
            newest = self._ledger.calls[-1] if self._ledger.calls else None
            mark = (newest, newest is not None and newest.ended_s is not None)
            if mark == seen and time.monotonic() - told_s < SIGN_OF_LIFE_S:
                continue
            try:
                self._publish()
            except (dist.DistError, RuntimeError) as lost:
                self.lost_store = str(lost)  # said by `explain`, and by the next call that needs the store
                return
            seen, told_s = mark, time.monotonic()

    def _publish(self) -> None:
        newest = list(islice(reversed(self._ledger.calls), _NUM_PUBLISHED))
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        with self._lock:
            self._beat += 1
            text = json.dumps([self._beat, self._state, find_site(frame), [call.to_list() for call in newest]])
            self._store.set(f"rank/{self._rank}", text)

    def _read(self, rank: int) -> RankState:
        with self._lock:
            text = self._store.get(f"rank/{rank}")
        beat, state, location, calls = json.loads(text)
        entered = tuple((call[0], call[1], call[2], tuple(call[3]), call[4], call[5], call[6]) for call in calls)
        return RankState(rank, beat, state, location, entered)

    def _wait_for(
        self, rank: int, call: CollectiveCall, ranks: Sequence[int]
    ) -> tuple[str, tuple[int, ...], str, str] | None:
        """Wait until `rank` has entered the call of that number; `None` where it is already too far ahead to say."""
        until_s, pause_s = time.monotonic() + self._timeout_s, _FIRST_POLL_S
        while time.monotonic() < until_s:
            state = self._read(rank)
            other = state.find_call(call.group, call.sequence)
            if other is not None or state.find_last(call.group) > call.sequence:
                return other
            if state.state != "running":
                raise self._fail(
                    CommunicationError(f"{describe_call(call)} cannot be done: rank {rank} {state.state}; read its log")
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        raise self.explain(call, ranks, TimeoutError(f"nobody came within {self._timeout_s:g} s"))

    def _fail(self, error: CommunicationError) -> CommunicationError:
        self._state = f"failed: {first_sentence(error)[:500]}"
        self._publish()
        return error

    def _describe_mismatch(
        self, call: CollectiveCall, rank: int, other: tuple[str, tuple[int, ...], str, str]
    ) -> CollectiveMismatchError:
        return CollectiveMismatchError(
            f"call #{call.sequence} of group {call.group!r} is {_word(*call.signature)} on rank {self._rank} "
            f"({call.site}) and {_word(*other[:3])} on rank {rank} ({other[3]}); all ranks of a group have to call "
            "the same collectives with the same shapes in the same order"
        )

    def _report(
        self,
        call: CollectiveCall,
        before: dict[int, RankState],
        after: dict[int, RankState],
        error: BaseException,
    ) -> str:
        lines = [f"{describe_call(call)} did not end on rank {self._rank}: {first_sentence(error)}"]
        waiting: dict[str, list[int]] = defaultdict(list)
        for rank, state in after.items():
            entered = state.find_call(call.group, call.sequence)
            is_silent = rank != self._rank and state.beat == before[rank].beat and state.state == "running"
            if is_silent:
                silent = "gives no sign of life (it ended, was stopped, or holds the interpreter)"
                lines.append(f"  rank {rank} {silent}; last seen at {state.location}")
            if state.state != "running" and rank != self._rank:
                lines.append(f"  rank {rank} {state.state}")
            if entered is not None:
                waiting[entered[3]].append(rank)
            elif state.find_last(call.group) < call.sequence:
                lines.append(f"  rank {rank} never entered {_name(call)}; {_describe_place(state)}")
        lines += [
            f"  waiting in it: rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} at {site}"
            for site, ranks in waiting.items()
        ]
        if records := read_flight_recorder():
            lines.append(f"  NCCL's flight recorder: {records}")
        return "\n".join(lines)


def read_flight_recorder() -> str:
    """Return what NCCL's flight recorder holds as JSON, and nothing where no GPU is or it is off."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return ""
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

    return str(_dump_fr_trace_json(includeCollectives=True, onlyActive=True))


def describe_call(call: CollectiveCall) -> str:
    """Name a call, its group, and the line that it was made from."""
    return f"{_name(call)} of group {call.group!r} ({_word(*call.signature)}, {call.num_bytes} bytes, from {call.site})"


def _name(call: CollectiveCall) -> str:
    return f"{call.operation} #{call.sequence}"


def _word(operation: str, shape: tuple[int, ...], dtype: str) -> str:
    return f"{operation} of {dtype}{list(shape)}"


def _describe_place(state: RankState) -> str:
    in_flight = [call for call in state.calls if not call[6]]
    if in_flight:
        group, number, operation, *_, site, _ = in_flight[0]
        return f"it waits in {operation} #{number} of group {group!r} at {site}"
    return f"it is at {state.location}"


def first_sentence(error: BaseException) -> str:
    """The first line of a message, or the name of the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
