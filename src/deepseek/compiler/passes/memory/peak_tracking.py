"""How much memory a piece of code takes at its peak, as it runs: two ways, which check each other.

`StorageTracker` sees every tensor that an operator returns and when its storage goes away. It costs little, works on
fake tensors, and knows nothing of what a kernel takes for itself, nor of what compiled code allocates.
`measure_peak_bytes` asks torch's profiler, which hears of every allocation from the allocator itself, compiled code
included. It slows the code down and is for measuring only.

Both count what is taken from their beginning on; what was there before is not counted, and neither is its release.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MARK = "deepseek.measuring "


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of the storages that operators create inside the `with`, while they are alive.

    >>> with StorageTracker() as tracker:
    ...     total = (torch.ones(256) + 1).sum()
    >>> tracker.alive_bytes, tracker.peak_bytes
    (4, 2048)
    """

    supports_higher_order_operators = True  # a branch counts by its result

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive_bytes = 0
        self.peak_bytes = 0
        self._sizes_bytes: dict[int, int] = {}
        self._lock = threading.RLock()  # autograd's threads release storages, too

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in([*args, *(kwargs or {}).values()]):
            self._watch(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._watch(tensor, is_new=True)
        return result

    def restart(self) -> int:
        """Forget the peak so far; the bytes alive now."""
        self.peak_bytes = self.alive_bytes
        return self.alive_bytes

    def _watch(self, tensor: Tensor, *, is_new: bool) -> None:
        """Count a storage until it goes away; one that was there before counts for nothing."""
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            if key in self._sizes_bytes:
                return
            self._sizes_bytes[key] = storage.nbytes() if is_new else 0
            self.alive_bytes += self._sizes_bytes[key]
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        with self._lock:
            self.alive_bytes -= self._sizes_bytes.pop(key, 0)


@dataclass(frozen=True)
class Peak:
    """Bytes that one call took."""

    peak_bytes: int
    """The most that was taken at once."""
    left_bytes: int
    """Bytes still taken at its end: its result, and what it keeps."""


def measure_peak_bytes(run: Callable[[], object]) -> Peak:
    """Return the bytes that `run` takes from the allocator at its peak, on the CPU or on the GPU that is present."""
    return _measure_on_gpu(run) if torch.cuda.is_available() else measure_peaks_on_cpu([run])[0]


def measure_peaks_on_cpu(runs: Sequence[Callable[[], object]]) -> list[Peak]:
    """Measure the peaks of several calls, one after the other, in one session of the profiler."""
    kept = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        for index, run in enumerate(runs):
            with torch.profiler.record_function(f"{_MARK}{index}"):
                kept.append(run())
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name().startswith(_MARK)}
    del kept
    return [_find_peak(changes, *spans[f"{_MARK}{index}"]) for index in range(len(runs))]


def _find_peak(changes: Sequence[tuple[int, int]], begin_ns: int, end_ns: int) -> Peak:
    alive_bytes = peak_bytes = 0
    for at_ns, change_bytes in changes:
        if begin_ns <= at_ns <= end_ns:
            alive_bytes += change_bytes
            peak_bytes = max(peak_bytes, alive_bytes)
    return Peak(peak_bytes, alive_bytes)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a value, which may be a list, a tuple or a dict of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def _measure_on_gpu(run: Callable[[], object]) -> Peak:
    torch.cuda.synchronize()
    before_bytes = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    peak = Peak(torch.cuda.max_memory_allocated() - before_bytes, torch.cuda.memory_allocated() - before_bytes)
    del result
    return peak
