"""Order and samples depend on the seed alone: not on workers, ranks, or where a run was taken up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError, DataError, StorageError
from deepseek.data.samples import (
    MAX_WORKERS,
    BrokenSampleError,
    SampleLoader,
    choose_num_workers,
    evaluation_batches,
    list_batches,
)

SIZES = {
    "num_samples": st.integers(4, 40),
    "batch_size": st.integers(1, 4),
    "seed": st.integers(0, 5),
    "start": st.integers(0, 3),
}


class Numbers:
    """Sample i is (i, a random number)."""

    digest = "numbers"

    def __init__(self, count: int = 11, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, random: np.random.Generator | None) -> tuple[int, float]:
        if index in self.broken:
            raise BrokenSampleError(f"number {index} is broken")
        return index, 0.0 if random is None else random.random()


def loader(**changes: Any) -> SampleLoader[Any, Any]:
    values: dict[str, Any] = {"source": Numbers(), "batch_size": 3, "collate": list, "seed": 1}
    values |= changes
    return SampleLoader(values.pop("source"), **values)


@settings(deadline=None)
@given(**SIZES)
def test_every_epoch_has_every_sample_once(num_samples: int, batch_size: int, seed: int, start: int) -> None:
    plans = list_batches(num_samples, batch_size, seed=seed, rank=0, world_size=1, epoch=start, index=0)
    items = [item for _, plan in zip(range(3 * num_samples), plans, strict=False) for item in plan.items]
    for epoch in range(start, start + 2):
        mine = [sample for number, sample in items if number == epoch]
        assert sorted(mine) == list(range(num_samples))


@settings(deadline=None)
@given(**SIZES, world_size=st.integers(1, 3))
def test_ranks_share_one_order(num_samples: int, batch_size: int, seed: int, start: int, world_size: int) -> None:
    def read(rank: int, ranks: int, size: int) -> list[tuple[int, int]]:
        plans = list_batches(num_samples, size, seed=seed, rank=rank, world_size=ranks, epoch=start, index=0)
        return [item for _, plan in zip(range(6), plans, strict=False) for item in plan.items]

    whole = read(0, 1, batch_size * world_size)
    apart = [read(rank, world_size, batch_size) for rank in range(world_size)]
    assert [item for together in zip(*apart, strict=True) for item in together] == whole


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers: int) -> None:
    alone, helped = loader(), loader(num_workers=num_workers)
    assert [alone.next_batch() for _ in range(9)] == [helped.next_batch() for _ in range(9)]
    assert alone.state_dict() == helped.state_dict()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_saved_position_goes_on_with_the_next_sample_for_any_number_of_workers(num_workers: int) -> None:
    whole = loader()
    expected = [whole.next_batch() for _ in range(10)]
    first = loader(num_workers=2 - num_workers)
    for _ in range(5):
        first.next_batch()
    second = loader(num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert [second.next_batch() for _ in range(5)] == expected[5:]


def test_a_sample_is_another_in_each_epoch_and_the_same_in_any_batch() -> None:
    small, large = loader(batch_size=1), loader(batch_size=11)
    apart = [small.next_batch()[0] for _ in range(22)]
    assert apart == large.next_batch() + large.next_batch()
    assert Counter(index for index, _ in apart) == dict.fromkeys(range(11), 2)
    assert len({number for _, number in apart}) == 22


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_sample_is_named_once_and_left_out(num_workers: int) -> None:
    numbers = loader(source=Numbers(broken=(4,)), num_workers=num_workers, max_broken=1)
    with pytest.warns(UserWarning, match="left out: number 4 is broken") as caught:
        batches = [numbers.next_batch() for _ in range(11)]
    assert len(caught) == 1
    assert 4 not in {index for batch in batches for index, _ in batch}
    assert sum(map(len, batches)) == 33 - 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_of_broken_samples_ends_the_run_though_the_limit_is_higher(num_workers: int) -> None:
    numbers = loader(source=Numbers(broken=tuple(range(11))), num_workers=num_workers, max_broken=100)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match="no sample of a whole epoch can"):
        numbers.next_batch()


def test_too_many_broken_samples_end_the_run() -> None:
    numbers = loader(source=Numbers(broken=(1, 2, 3)), max_broken=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"3 samples cannot be loaded and 2 may be left out; the last one: number"):
            for _ in range(11):
                numbers.next_batch()


def test_evaluation_is_every_sample_once_as_it_is_over_all_ranks() -> None:
    ranks = [list(evaluation_batches(Numbers(), 2, list, rank=rank, world_size=2)) for rank in range(2)]
    samples = [sample for batches in ranks for batch in batches for sample in batch]
    assert sorted(samples) == [(index, 0.0) for index in range(11)]
    with pytest.raises(BrokenSampleError, match="number 4"):
        list(evaluation_batches(Numbers(broken=(4,)), 2, list))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_load_an_evaluation_as_one_process_does(num_workers: int) -> None:
    batches = evaluation_batches(Numbers(), 2, list, num_workers=num_workers)
    assert len(batches) == 6
    for _ in range(2):
        assert [index for batch in batches for index, _ in batch] == list(range(11))
    with pytest.raises(BrokenSampleError, match="number 4"):
        list(evaluation_batches(Numbers(broken=(4,)), 2, list, num_workers=num_workers))
    assert next(iter(batches)) == [(0, 0.0), (1, 0.0)]


def test_what_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(DataError, match="there are 2 samples and a batch takes 3; lower batch_size or add samples"):
        loader(source=Numbers(2))
    with pytest.raises(ConfigError, match="rank=2 is not below world_size=2"):
        loader(rank=2, world_size=2)
    position = loader().state_dict()
    with pytest.raises(DataError, match="other samples or another seed"):
        loader(seed=2).load_state_dict(position)
    with pytest.raises(DataError, match="has nothing"):
        loader().load_state_dict({})


def test_workers_draw_nothing_from_the_generator_that_dropout_draws_from() -> None:
    before = torch.get_rng_state()
    loader(num_workers=1).next_batch()
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_tensors_come_back_from_workers() -> None:
    numbers = loader(num_workers=1, collate=torch.tensor)
    assert numbers.next_batch().shape == (3, 2)


def test_half_of_the_cores_load_samples_unless_a_number_is_asked_for() -> None:
    assert [choose_num_workers(asked) for asked in (0, 1, 9)] == [0, 1, 9]
    assert choose_num_workers(None) == min(MAX_WORKERS, len(os.sched_getaffinity(0)) // 2)


class Failing(Numbers):
    """Sample 4 cannot be loaded for a reason that is not its own."""

    def load(self, index: int, random: np.random.Generator | None) -> tuple[int, float]:
        if index == 4:
            raise StorageError("the disk is gone; mount it again")
        return super().load(index, random)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_that_is_not_the_samples_own_ends_the_run_in_its_own_words(num_workers: int) -> None:
    numbers = loader(source=Failing(), num_workers=num_workers)
    with pytest.raises(StorageError, match=r"^the disk is gone; mount it again$"):
        for _ in range(4):
            numbers.next_batch()


def test_a_worker_that_was_killed_is_named() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # another test may have used torch's loader as it is
    before = set(multiprocessing.active_children())
    numbers = loader(num_workers=1)
    numbers.next_batch()
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(DataError, match=r"a process that loads samples has died \(.*\); if memory ran out, low"):
        for _ in range(20):
            numbers.next_batch()


ENDING = """
import os, signal
from tests.data.test_samples import loader

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
numbers = loader(num_workers=2)
numbers.next_batch()
os.killpg(0, signal.SIGTERM)
batches = [numbers.next_batch() for _ in range(20)]
print(len(batches), stopped)
"""


def test_workers_stay_while_a_run_ends_that_was_told_so_with_its_group() -> None:
    result = subprocess.run(
        [sys.executable, "-c", ENDING], start_new_session=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "20 [True]\n", "")
