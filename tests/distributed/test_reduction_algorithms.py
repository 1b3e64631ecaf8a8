import pytest
import torch
import torch.distributed as dist

from deepseek.core.errors import ConfigError
from deepseek.distributed import reduction_algorithms
from deepseek.distributed.reduction_algorithms import list_candidates, list_own_steps, name_operator
from deepseek.distributed.topology import RankTopology
from tests.distributed.ranks import run_ranks
from tests.distributed.test_communicator import HOSTS, WORLD, join, make_numbers


def check_payload(rank):
    with join(hosts=HOSTS) as comm:
        numbers = [make_numbers(other, 1001) for other in range(WORLD)]
        exact = sum(each.double() for each in numbers)
        for algorithm in ("ring", "hierarchical", "tree", "auto"):
            found = comm.all_reduce(numbers[rank].clone(), algorithm=algorithm, payload=torch.bfloat16)
            error = float((found - exact).abs().max() / exact.abs().max())
            assert 1e-6 < error < 0.02  # it did travel in 8 bits of mantissa, a few times
            everywhere = comm.all_gather(found).view(WORLD, -1)
            assert (everywhere == everywhere[0]).all()
    return rank


def reduce_in_slices(rank):
    """Whether all ranks have the same sums, and how far these are from float64, of a buffer of 1, 3 and 4 slices."""
    found = []
    with join(hosts=HOSTS) as comm:
        for slice_bytes in (1 << 20, 1500, 100):
            reduction_algorithms.SLICE_BYTES = slice_bytes
            for algorithm in ("ring", "hierarchical", "tree"):
                numbers = [make_numbers(other, 1201) for other in range(WORLD)]
                total = comm.all_reduce(numbers[rank].clone(), algorithm=algorithm)
                everywhere = comm.all_gather(total).view(WORLD, -1)
                is_equal = bool((everywhere == everywhere[0]).all())
                exact = sum(each.double() for each in numbers)
                found.append((is_equal, float((total - exact).abs().max() / exact.abs().max())))
    return found


def test_slices_that_take_turns_give_the_sums_and_all_ranks_the_same_bits():
    for found in run_ranks(reduce_in_slices, WORLD, is_grouped=False):
        assert len(found) == 9 and all(is_equal and error < 1e-6 for is_equal, error in found)


def refuse_two_levels(rank):
    with join(hosts=["a", "a", "b"]) as comm, pytest.raises(ConfigError, match="equally many ranks on each host"):
        comm.all_reduce(torch.ones(3), algorithm="hierarchical")
    return rank


def test_sixteen_bit_payloads_are_added_in_full_and_end_equal_everywhere():
    assert run_ranks(check_payload, WORLD, is_grouped=False) == list(range(WORLD))


def test_two_levels_need_equally_many_ranks_on_each_host():
    assert run_ranks(refuse_two_levels, 3, is_grouped=False) == [0, 1, 2]
    assert list_candidates(RankTopology.of(HOSTS)) == ("flat", "ring", "hierarchical", "tree")
    assert list_candidates(RankTopology.of(["a"] * 4)) == ("flat", "ring", "tree")


def test_a_reduction_without_a_message_list_is_refused():
    assert name_operator(dist.ReduceOp.MAX) == "MAX"
    with pytest.raises(ConfigError, match="has no message list; use one of SUM"):
        name_operator(dist.ReduceOp.BXOR)


def test_a_rank_of_a_ring_sends_one_part_and_receives_one_in_each_step():
    steps = list_own_steps("ring_all_reduce", 4, 8, 1, 2)
    assert [(len(sent), len(received)) for sent, received in steps] == [(1, 1)] * 6
