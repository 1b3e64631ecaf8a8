"""Ranks that are late, gone, or call something else: what the others are told, and that all of them end."""

import os
import socket
import time

import pytest
import torch

from deepseek.core.errors import CollectiveMismatchError, CommunicationError
from deepseek.distributed import DeepSeekComm
from tests.distributed.ranks import end_ranks, run_ranks

HERE = r"test_hang_doctor\.py:\d+"


def join(timeout_s):
    return DeepSeekComm.init("gloo", init_method=f"file://{os.environ['STORE_FILE']}", timeout_s=timeout_s)


def call_different_things(rank):
    """Two ranks that part in operation, shape, dtype or order: both are told, and neither exchanges a byte of it."""
    with join(60) as comm:
        comm.barrier()
        calls = {
            "operation": (
                lambda: comm.all_reduce(torch.ones(4), algorithm="flat"),
                lambda: comm.all_gather(torch.ones(4)),
            ),
            "shape": [lambda size=size: comm.all_reduce(torch.ones(size), algorithm="flat") for size in (4, 5)],
            "dtype": [
                lambda dtype=dtype: comm.all_reduce(torch.ones(4, dtype=dtype), algorithm="flat")
                for dtype in (torch.float32, torch.int32)
            ],
        }
        for name, sides in calls.items():
            with pytest.raises(CollectiveMismatchError) as found:
                sides[rank]()
            words = {"operation": "all_gather", "shape": r"\[5\]", "dtype": "int32"}
            assert found.match(words[name])
            assert found.match(f"all_reduce.*of float32\\[4\\] on rank 0 \\(.*{HERE}\\)|on rank 1 \\(.*{HERE}\\)")
            assert found.match("the same collectives with the same shapes in the same order")
        comm.all_reduce(torch.ones(1), algorithm="flat")  # a caught mismatch breaks nothing
    return rank


def let_one_sleep(rank):
    with join(1.0) as comm:
        comm.all_reduce(torch.ones(2), algorithm="flat")
        if rank == 2:
            time.sleep(6)
            return ""
        with pytest.raises(CommunicationError) as found:
            comm.all_reduce(torch.ones(3), algorithm="flat")
        return str(found.value)


def let_one_die(rank):
    with join(20) as comm:
        for _ in range(2):  # the second is of a known kind, so nothing is compared before it
            if rank == 1 and comm.ledger.calls:
                os._exit(9)
            comm.all_reduce(torch.ones(2), algorithm="ring")


def let_the_store_die(rank, port):
    """Ranks that meet over TCP without a launcher: the store is in rank 0, and goes with it."""
    with DeepSeekComm.init("gloo", init_method=f"tcp://127.0.0.1:{port}", timeout_s=20) as comm:
        comm.barrier()
        if rank == 0:
            os._exit(9)
        comm.all_reduce(torch.ones(2), algorithm="flat")


def let_one_fail(rank):
    with join(20) as comm:
        if rank == 0:
            raise ValueError("no such file")
        comm.barrier()


def test_a_mismatch_is_named_on_every_rank_before_anything_is_sent():
    assert run_ranks(call_different_things, 2, is_grouped=False) == [0, 1]


def test_a_timeout_says_who_never_came_where_it_is_and_where_the_others_wait():
    reports = run_ranks(let_one_sleep, 3, is_grouped=False, timeout_s=60)
    for rank in (0, 1):
        first, *rest = reports[rank].splitlines()
        assert first.startswith("all_reduce(SUM) #2 of group 'world' (all_reduce(SUM) of float32[3], 12 bytes, from ")
        text = "\n".join(rest)
        assert "rank 2 never entered all_reduce(SUM) #2; it is at " in text
        asleep = next(line for line in rest if "never entered" in line)
        assert f"test_hang_doctor.py:{let_one_sleep.__code__.co_firstlineno + 4}" in asleep
        assert "waiting in it: ranks 0, 1 at " in text


def test_a_rank_that_dies_ends_the_others_within_the_timeout_and_is_named():
    ended = end_ranks(let_one_die, 3, is_grouped=False, timeout_s=60)
    assert ended[1].exit_code == 9
    for rank in (0, 2):
        assert ended[rank].exit_code == 1
        assert "CommunicationError" in ended[rank].error
        assert "rank 1 gives no sign of life" in ended[rank].error or "failed: " in ended[rank].error


def test_the_death_of_the_rank_that_holds_the_store_is_told_as_that():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ended = end_ranks(let_the_store_die, 2, port, is_grouped=False, timeout_s=60)
    assert [each.exit_code for each in ended] == [9, 1]
    assert "CommunicationError: all_reduce(SUM) #2 of group 'world'" in ended[1].error
    assert "the store that ranks report to is gone" in ended[1].error


def test_a_rank_that_fails_tells_the_others_why_it_left():
    ended = end_ranks(let_one_fail, 2, is_grouped=False, timeout_s=60)
    assert "rank 0 failed: ValueError: no such file" in ended[1].error
