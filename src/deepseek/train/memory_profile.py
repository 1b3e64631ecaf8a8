"""What a run needs its memory for, and whether it needs more and more of it (`ds_memory_profiler: true`).

One step of each process, `memory_profiler_step`, is recorded allocation by allocation: bytes alive over the step by
module and kind, who holds most at the peak, how long allocations live. That is the event `MemoryMeasured` and the page
`memory.html` in the run's folder. Then leaks are watched for, in two ways, at every step that is logged:

- tensors that Python knows of are counted by type and shape; a count that rises `LOOKS` times in a row leaks;
- the step is recorded, and what is left of it at the next look is no weight, no gradient and no state; where the same
  module leaves the same shape at `LOOKS` looks in a row, it leaks, also if only a graph of autograd holds it.

Costs the time of a recorded step at every logged one, about as much again as the step, and nothing at the others.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from deepseek.core.storage import write_file
from deepseek.train.allocations import AllocationRecorder, Recording, describe_shape, list_live_tensors
from deepseek.train.events import MemoryLeakSuspected, MemoryMeasured
from deepseek.train.memory_page import render_memory
from deepseek.train.step_memory import StepMemory, summarize

LOOKS = 5
PAGE = "memory.html"
"""File in the folder of a run."""


@dataclass(eq=False)
class MemoryProfiler:
    """Watches the memory of one process of a run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    page: Path
    measured_step: int
    """Step of this process, from 1, that is recorded for the page."""
    look_every: int
    """Steps of the run between two looks."""
    measured: StepMemory | None = None
    leaks: list[MemoryLeakSuspected] = field(default_factory=list)
    looks: list[tuple[int, int]] = field(default_factory=list)
    """Steps, and the bytes of tensors that Python knew of after them."""
    _num_steps: int = 0
    _recording: Recording | None = None
    _last_recording: Recording | None = None
    _counts: deque[Counter[str]] = field(default_factory=lambda: deque(maxlen=LOOKS + 1))
    _survivors: deque[Counter[tuple[str, str]]] = field(default_factory=lambda: deque(maxlen=LOOKS))
    _named: set[str] = field(default_factory=set)

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Record the step `step` of the run, which is taken while the block runs, if it is one to look at."""
        self._num_steps += 1
        self._recording = None
        if self._num_steps != self.measured_step and step % self.look_every != 0:
            yield
            return
        recorder = AllocationRecorder(self.model, self.optimizer, with_others=self._num_steps == self.measured_step)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with recorder:
            yield
        self._recording = recorder.recording

    def report(self, step: int) -> Iterator[MemoryMeasured | MemoryLeakSuspected]:
        """Say what was found, once the step is over."""
        if self._recording is None:
            return
        if self._num_steps == self.measured_step:
            peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            self.measured = summarize(step, self._recording, peak)
            self.write_page()
            yield MemoryMeasured(
                step,
                self.measured.peak_bytes,
                self.measured.peak_by_kind,
                tuple((holder.path, holder.kind, holder.num_bytes) for holder in self.measured.holders),
                self.measured.allocator_peak_bytes,
                str(self.page),
            )
        if step % self.look_every == 0 and (leak := self._look(step)) is not None:
            self.leaks.append(leak)
            self.write_page()
            yield leak

    def write_page(self) -> None:
        """Write the page again, with what is known now."""
        if self.measured is not None:
            write_file(self.page, render_memory(self.measured, self.looks, self.leaks).encode())

    def _look(self, step: int) -> MemoryLeakSuspected | None:
        found = self._find_leaks(step)
        if found.keys() - self._named:  # garbage that waits for its collection is no leak
            gc.collect()
            self.looks.pop()
            self._counts.pop()
            if self._last_recording is not None:
                self._survivors.pop()
            found = self._find_leaks(step)
        self._last_recording = self._recording
        new = {name: module for name, module in found.items() if name not in self._named}
        if not new:
            return None
        self._named |= new.keys()
        first_step, first_bytes = self.looks[-min(LOOKS + 1, len(self.looks))]
        modules = tuple(sorted(set(new.values())))
        return MemoryLeakSuspected(step, first_step, self.looks[-1][1] - first_bytes, tuple(new), modules)

    def _find_leaks(self, step: int) -> dict[str, str]:
        tensors = list_live_tensors()
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        self.looks.append((step, sum(storages.values())))
        self._counts.append(Counter(describe_shape(tensor) for tensor in tensors))
        if self._last_recording is not None:
            left = self._last_recording.survivors()
            self._survivors.append(Counter((one.shape, one.path) for one in left))
        return describe_leaks(find_growing(self._counts), find_constant(self._survivors))


def find_growing(counts: Sequence[Counter[str]]) -> dict[str, int]:
    """Return the shapes whose count rose from look to look, `LOOKS` times, with how much it rose in all.

    >>> find_growing([Counter({"a": number, "b": 1}) for number in range(LOOKS + 1)])
    {'a': 5}
    """
    if len(counts) <= LOOKS:
        return {}
    pairs = list(pairwise(counts))
    return {
        shape: counts[-1][shape] - counts[0][shape]
        for shape in counts[-1]
        if all(before[shape] < after[shape] for before, after in pairs)
    }


def find_constant(survivors: Sequence[Counter[tuple[str, str]]]) -> dict[tuple[str, str], int]:
    """Return what was left of the recorded step at each of `LOOKS` looks, with the least number that was."""
    if len(survivors) < LOOKS:
        return {}
    common = set.intersection(*(set(left) for left in survivors))
    return {key: min(left[key] for left in survivors) for key in sorted(common)}


def describe_leaks(growing: dict[str, int], leaving: dict[tuple[str, str], int]) -> dict[str, str]:
    """Name each leak by its shape, with the module that allocates it, or none where that is unknown."""
    modules = {shape: path or "outside of the model" for shape, path in leaving}
    found = {f"{shape} left by each step": modules[shape] for shape, _ in leaving}
    found |= {f"{shape} more and more": "unknown" for shape in growing if shape not in modules}
    return found
