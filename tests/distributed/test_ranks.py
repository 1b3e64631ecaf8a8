import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import end_ranks, run_ranks


def sum_ranks(rank, offset):
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return int(total), torch.get_num_threads()


def fail_on_one(rank):
    if rank == 1:
        raise ValueError("this rank is meant to fail")


def sleep_long(rank):
    time.sleep(30)


def leave_at_once(rank):
    os._exit(7)


def test_ranks_meet_and_answer_in_order_with_one_thread_each():
    assert run_ranks(sum_ranks, 2, 10) == [(21, 1), (21, 1)]


def test_the_traceback_of_a_rank_that_fails_is_what_the_test_shows():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*this rank is meant to fail"):
        run_ranks(fail_on_one, 2, is_grouped=False)
    ended = end_ranks(fail_on_one, 2, is_grouped=False)
    assert [each.exit_code for each in ended] == [0, 1]


def test_ranks_that_are_late_show_their_stacks_and_are_gone():
    with pytest.raises(AssertionError, match="sleep_long"):
        run_ranks(sleep_long, 2, is_grouped=False, timeout_s=1.5)


def test_a_rank_that_dies_without_a_word_is_found():
    with pytest.raises(AssertionError, match="rank 0 failed"):
        run_ranks(leave_at_once, 1, is_grouped=False)
