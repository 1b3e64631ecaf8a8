"""Samples that are loaded one by one (images, rows of a table), in an order and with augmentations that repeat.

    loader = SampleLoader(source, batch_size=32, collate=stack, seed=0, num_workers=2)
    batch = loader.next_batch()              # never ends
    state = loader.state_dict()              # {"epoch", "index", "order"}: the next batch, also for other workers

Each epoch is a permutation by (seed, epoch). A sample is loaded with a random generator of its own, made from (seed,
epoch, sample), so that what it becomes does not depend on who loads it or after what: one process or ten workers give
the same batches bit for bit. The position counts samples over all ranks together; of the next `batch_size * world_size`
rank r takes those at r, r + world_size, ...

Workers are torch's (`DataLoader`), forked where the system can, in process groups of their own; they load ahead of what
is asked for, and the position is that of what was handed out. A sample that cannot be loaded is left out of its batch,
named in a warning and counted; more than `max_broken` end the run.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError, DataError, DeepSeekError, first_line
from deepseek.core.machine import count_cores
from deepseek.data.one_pass import OnePass

S_co = TypeVar("S_co", covariant=True)
S = TypeVar("S")
B = TypeVar("B")
MAX_WORKERS = 4
"""Processes that load samples, unless told otherwise."""
MAX_BROKEN = 100
"""Samples that may be left out because they cannot be loaded, unless told otherwise."""


class BrokenSampleError(DataError):
    """One sample cannot be loaded: a damaged image, a row without its fields. The message names it."""


class TooFewSamplesError(DataError):
    """There are fewer samples than one batch takes."""


class SampleSource(Protocol[S_co]):
    """A known number of samples."""

    @property
    def digest(self) -> str:
        """Which samples these are, in their order: the same exactly when all of them are."""

    def __len__(self) -> int: ...

    def load(self, index: int, random: np.random.Generator | None) -> S_co:
        """Load one sample, augmented by `random` or, where that is `None`, as it is.

        Raises `BrokenSampleError` where that cannot be done.
        """


@dataclass(frozen=True, eq=False)
class SampleList(Generic[S]):
    """Samples that are in memory, and are not augmented."""

    samples: Sequence[S]
    digest: str

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int, random: np.random.Generator | None) -> S:
        """Return the sample."""
        return self.samples[index]


class SampleLoader(Generic[S, B]):
    """Batches without end, with a position that can be saved and restored."""

    def __init__(
        self,
        source: SampleSource[S],
        *,
        batch_size: int,
        collate: Callable[[list[S]], B],
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_broken: int = MAX_BROKEN,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is not below world_size={world_size}; ranks count from 0")
        if len(source) < batch_size * world_size:
            raise TooFewSamplesError(
                f"there are {len(source)} samples and a batch takes {batch_size * world_size}; lower batch_size or add "
                "samples"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.max_broken = max_broken
        self._collate = collate
        self._epoch = self._index = 0
        self._broken: dict[str, None] = {}
        self._batches: Iterator[_Loaded[B]] | None = None

    def __iter__(self) -> Iterator[B]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> B:
        """Return the batch at the position, and move the position on; raises `DataError` after too many broken ones."""
        num_passed = 0
        while True:
            if self._batches is None:
                self._batches = self._start()
            loaded = _wait(self._batches)
            self._epoch, self._index = loaded.position_after
            self._count_broken(loaded.broken)
            if loaded.batch is not None:
                return loaded.batch
            num_passed += self.batch_size * self.world_size
            if num_passed >= len(self.source) + self.batch_size * self.world_size:  # each sample once, surely
                raise DataError(f"no sample of a whole epoch can be loaded; the last one: {loaded.broken[-1]}")

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as JSON values."""
        return {"epoch": self._epoch, "index": self._index, "order": self._order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; raises `DataError` when it was saved for other samples or another seed."""
        if set(state) != {"epoch", "index", "order"}:
            raise DataError(f"a data position has epoch, index and order; this one has {', '.join(state) or 'nothing'}")
        if state["order"] != self._order:
            raise DataError(
                "the saved data position belongs to other samples or another seed; resume with the data it was saved "
                "with, or start a new run"
            )
        self._epoch, self._index, self._batches = int(state["epoch"]), int(state["index"]), None

    @cached_property
    def _order(self) -> str:
        # Once: a source may look at every sample for its digest, and a position is asked for at every step.
        return hashlib.sha256(json.dumps([self.source.digest, self.seed]).encode()).hexdigest()

    def _start(self) -> Iterator[_Loaded[B]]:
        """Begin to load from the position on."""
        plan = list_batches(
            len(self.source),
            self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            epoch=self._epoch,
            index=self._index,
        )
        dataset = _Batches(self.source, self.seed, self._collate)
        if not self.num_workers:
            return (dataset[batch] for batch in plan)
        return _load_in_workers(dataset, plan, self.num_workers)

    def _count_broken(self, messages: Sequence[str]) -> None:
        for message in messages:
            if message not in self._broken:
                self._broken[message] = None
                warn_caller(f"left out: {message}")
        if len(self._broken) > self.max_broken:
            raise DataError(
                f"{len(self._broken)} samples cannot be loaded and {self.max_broken} may be left out; the last one: "
                f"{messages[-1]}"
            )


def choose_num_workers(asked: int | None) -> int:
    """Return how many processes load samples: what is asked for, else one for each two cores and four at most.

    The other cores compute. With a single core, the training process loads as well.
    """
    return min(count_cores() // 2, MAX_WORKERS) if asked is None else asked


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one batch of one rank, and the position after it."""

    items: tuple[tuple[int, int], ...]
    """Epoch and sample, each."""
    position_after: tuple[int, int]
    """Epoch, and samples of it that are used up by all ranks."""


def list_batches(
    num_samples: int, batch_size: int, *, seed: int, rank: int, world_size: int, epoch: int, index: int
) -> Iterator[BatchPlan]:
    """List the batches of one rank without end, from the position (`epoch`, `index`) on.

    >>> first = next(list_batches(5, 4, seed=0, rank=0, world_size=1, epoch=0, index=3))
    >>> [epoch for epoch, _ in first.items], first.position_after
    ([0, 0, 1, 1], (1, 2))
    """
    order = order_samples(num_samples, seed, epoch)
    while True:
        items = []
        for number in range(batch_size * world_size):
            if index == num_samples:
                epoch, index = epoch + 1, 0
                order = order_samples(num_samples, seed, epoch)
            if number % world_size == rank:
                items.append((epoch, int(order[index])))
            index += 1
        yield BatchPlan(tuple(items), (epoch, index))


def order_samples(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the samples of an epoch in their order, by sorting raw bits, which numpy keeps alike in all versions."""
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_samples), kind="stable")


def evaluation_batches(
    source: SampleSource[S],
    batch_size: int,
    collate: Callable[[list[S]], B],
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> OnePass[B]:
    """One pass over `source` in its own order, without augmentation; over all ranks each sample comes once.

    Raises `BrokenSampleError` for a sample that cannot be loaded: a measurement is of all samples or of none.

    >>> len(evaluation_batches(SampleList([1, 2, 3], ""), 2, list))
    2
    """
    mine = range(rank, len(source), world_size)
    plans = [tuple(mine[begin : begin + batch_size]) for begin in range(0, len(mine), batch_size)]
    num_workers = min(num_workers, len(plans))

    def begin() -> Iterator[B]:
        dataset = _WholeBatches(source, collate)
        is_alone = not num_workers
        loading = (dataset[plan] for plan in plans) if is_alone else _load_in_workers(dataset, plans, num_workers)
        for _ in plans:
            batch = _wait(loading).batch
            assert batch is not None
            yield batch

    return OnePass(len(plans), begin)


@dataclass(frozen=True)
class _Loaded(Generic[B]):
    batch: B | None
    """`None` where none of its samples could be loaded."""
    broken: tuple[str, ...]
    position_after: tuple[int, int]
    failure: DeepSeekError | None = None
    """What else went wrong, which ends the run."""


class _Batches(Dataset[_Loaded[B]], Generic[S, B]):
    """Loads a batch by its plan; a copy of it is in every worker."""

    def __init__(self, source: SampleSource[S], seed: int, collate: Callable[[list[S]], B]) -> None:
        self.source, self.seed, self.collate = source, seed, collate

    def __getitem__(self, plan: BatchPlan) -> _Loaded[B]:
        samples: list[S] = []
        broken: list[str] = []
        for epoch, index in plan.items:
            try:
                samples.append(self.source.load(index, np.random.Generator(np.random.PCG64([self.seed, epoch, index]))))
            except BrokenSampleError as error:
                broken.append(str(error))
            except DeepSeekError as error:  # raised through torch, it would come out with the worker's traceback
                return _Loaded(None, (), plan.position_after, error)
        return _Loaded(self.collate(samples) if samples else None, tuple(broken), plan.position_after)


class _WholeBatches(Dataset[_Loaded[B]], Generic[S, B]):
    """Loads a batch as it is, or not at all."""

    def __init__(self, source: SampleSource[S], collate: Callable[[list[S]], B]) -> None:
        self.source, self.collate = source, collate

    def __getitem__(self, indices: tuple[int, ...]) -> _Loaded[B]:
        try:
            return _Loaded(self.collate([self.source.load(index, None) for index in indices]), (), (0, 0))
        except DeepSeekError as error:
            return _Loaded(None, (), (0, 0), error)


class _Repeatable:
    """What torch takes for a sampler: something to iterate over."""

    def __init__(self, plan: Iterable[Any]) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[Any]:
        return iter(self._plan)


def _load_in_workers(dataset: Dataset[_Loaded[B]], plan: Iterable[Any], num_workers: int) -> Iterator[_Loaded[B]]:
    """Load the items of `plan` ahead in processes of their own, and return them in their order."""
    # Each item of the dataset is a whole batch, so torch's own batching is off.
    workers: DataLoader[_Loaded[B]] = DataLoader(
        dataset,
        sampler=_Repeatable(plan),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_leave_signals,
        prefetch_factor=2,
        # Else torch draws a seed for the workers from the generator of dropout, once more in a run that is resumed.
        generator=torch.Generator(),
    )
    before = set(multiprocessing.active_children())
    with _quiet_child_signals():
        batches = iter(workers)
    for worker in set(multiprocessing.active_children()) - before:
        _leave_group(worker.pid or 0)  # it does so itself, but maybe not before the group is signaled
    return batches


def _wait(batches: Iterator[_Loaded[B]]) -> _Loaded[B]:
    """Return the next batch, and raise what kept it from being loaded."""
    try:
        loaded = next(batches)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(
            f"a process that loads samples has died ({first_line(error)}); if memory ran out, lower num_workers or "
            "batch_size of the data"
        ) from error
    if loaded.failure is not None:
        raise loaded.failure
    return loaded


@contextmanager
def _quiet_child_signals() -> Iterator[None]:
    """Keep torch from raising out of a signal handler, wherever the run stands, when a worker dies.

    The next batch says so, within seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _leave_signals(_: int) -> None:
    """Leave the process group of the run: Ctrl-C in a terminal, `timeout` and the like signal all of a group.

    When the run ends is decided by its own process, which ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave_group(0)


def _leave_group(process: int) -> None:
    """Give a process, 0 for the own one, a group for itself, where the system has such."""
    if hasattr(os, "setpgid"):
        with suppress(ProcessLookupError):  # it has died since, which the loader notices
            os.setpgid(process, process)
