"""Ranks that agree and stop together; what they learn is in test_parallel_run.py."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import pytest

from deepseek.core.errors import ConfigError
from deepseek.core.events import Event
from deepseek.distributed.communicator import DeepSeekComm
from deepseek.train.ranks import Ranks, digest_code, in_step
from deepseek.train.task import Task
from tests.distributed.ranks import run_ranks
from tests.train.own_task import Line


@dataclass(frozen=True)
class Counted(Event):
    number: int


def count(closed: list[int]) -> Generator[Event, None, None]:
    number = 0
    try:
        while True:
            yield Counted(number)
            number += 1
    except GeneratorExit:
        closed.append(number)
        raise


def agree(rank: int) -> tuple[int, list[int], str]:
    with DeepSeekComm.init() as comm:
        ranks = Ranks(comm)
        shared = ranks.share(lambda: 10 + rank)
        closed: list[int] = []
        events = in_step(count(closed), ranks)
        for event in events:
            assert rank == 0
            if event == Counted(3):
                events.close()
        assert ranks.collect(rank) == [0, 1]
        ranks.require_alike({"seed": 0}, "code")
        with pytest.raises(ConfigError) as refused:
            ranks.require_alike({"seed": 0}, f"code {rank}")
        with pytest.raises(ConfigError, match="rank 1 has seed=1 and rank 0 seed=0; start all ranks with the same"):
            ranks.require_alike({"seed": rank}, "code")
    return shared, closed, str(refused.value)


def test_ranks_share_compare_and_leave_a_loop_at_the_same_event() -> None:
    for shared, closed, refused in run_ranks(agree, 2):
        assert shared == 10
        assert closed == [3]
        assert refused.startswith("rank 1 runs other code than rank 0 (digests code 1 and code 0)")


def test_a_task_of_ones_own_is_part_of_the_code() -> None:
    digests = {digest_code(Line), digest_code(Task)}
    assert len(digests) == 2
    assert digest_code(type("Typed", (Line,), {"__module__": "builtins"}))
