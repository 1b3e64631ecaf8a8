"""Broadcast down a binomial tree: in each step every rank that has the buffer gives it to one that has not.

ceil(log2 n) steps, n-1 messages of the whole buffer; the root is rank 0.
"""

from __future__ import annotations

from deepseek.distributed.collectives.messages import RankMessage, Step, check_counts


def order_messages(world_size: int, num_elements: int, domain_size: int = 1) -> tuple[Step, ...]:
    """List the steps over a buffer of `num_elements` that rank 0 holds; a tree knows no domains.

    >>> [len(step) for step in order_messages(6, 4)]
    [1, 2, 2]
    """
    check_counts(world_size, num_elements, domain_size)
    steps = []
    reached = 1
    while reached < world_size and num_elements:
        fresh = range(min(reached, world_size - reached))
        steps.append(tuple(RankMessage(rank, rank + reached, 0, num_elements, 0) for rank in fresh))
        reached *= 2
    return tuple(steps)
