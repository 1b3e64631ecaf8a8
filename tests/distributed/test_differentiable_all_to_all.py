import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.test_communicator import HOSTS, WORLD, join


def check_all(rank):
    with join(hosts=HOSTS) as comm:
        check_exchanges(comm, rank)
    return rank


def check_exchanges(comm, rank):
    counts = [[(3 * source + 5 * target) % 4 for target in range(WORLD)] for source in range(WORLD)]
    counts[1] = [0, 0, 0, 0]  # a rank without tokens
    sent, received = counts[rank], [counts[source][rank] for source in range(WORLD)]
    for algorithm in ("native", "ring", "pairwise", "hierarchical"):
        for known in (received, None):
            rows = torch.arange(sum(sent) * 2.0).view(-1, 2).add(100 * rank).requires_grad_()
            arrived = comm.all_to_all(rows, sent, known, algorithm=algorithm)
            expected = torch.cat([take_part(counts, source, rank) for source in range(WORLD)])
            assert torch.equal(arrived, expected), algorithm
            (arrived * (rank + 1)).sum().backward()
            scale = torch.cat([torch.full((count, 2), target + 1.0) for target, count in enumerate(sent)])
            assert torch.equal(rows.grad, scale), algorithm
    equal = comm.all_to_all(torch.arange(4.0) + 10 * rank, algorithm="ring")
    assert equal.tolist() == [rank + 10.0 * source for source in range(WORLD)]


def take_part(counts, source, target):
    rows = torch.arange(sum(counts[source]) * 2.0).view(-1, 2) + 100 * source
    return rows.split(counts[source])[target]


def test_uneven_and_empty_parts_arrive_in_rank_order_and_their_gradients_come_back():
    assert run_ranks(check_all, WORLD, is_grouped=False) == list(range(WORLD))
