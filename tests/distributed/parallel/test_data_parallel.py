import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepseek.distributed.parallel.data_parallel import GradientReducer, fill_buckets
from tests.distributed.ranks import run_ranks


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 64))
def test_buckets_hold_every_parameter_once_and_no_more_than_they_may(sizes, num_bytes):
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    buckets = fill_buckets(parameters, num_bytes)
    assert [id(each) for bucket in buckets for each in bucket] == [id(each) for each in reversed(parameters)]
    assert all(sum(each.nbytes for each in bucket) <= num_bytes or len(bucket) == 1 for bucket in buckets)


def test_a_bucket_has_one_dtype_and_frozen_parameters_are_in_none():
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))]
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    assert [len(bucket) for bucket in fill_buckets([*parameters, frozen], 1024)] == [1, 1]


def reduce_uneven(rank):
    """All ranks use the first weight, nobody the second, rank 1 alone the last, whose bucket comes first; twice."""
    weights = [nn.Parameter(torch.tensor([float(index)])) for index in range(3)]
    reducer = GradientReducer(weights, dist.group.WORLD, bucket_bytes=4)
    for index in range(2):
        if index == 1:
            reducer.begin()
        loss = weights[0] * (rank + 1)
        (loss + weights[2] * 10 if rank == 1 else loss).sum().backward()
    early = weights[0].grad.item()
    reducer.finish()
    return early, [None if weight.grad is None else weight.grad.item() for weight in weights]


def test_gradients_are_summed_once_a_step_also_where_a_rank_has_none():
    answers = run_ranks(reduce_uneven, 2)
    # Summed after two passes: 2 * (1 + 2); 2 * 10 of rank 1 alone; none of a weight that nobody used.
    assert [found for _, found in answers] == [[6.0, None, 20.0]] * 2
    assert [early for early, _ in answers] == [2.0, 4.0]
