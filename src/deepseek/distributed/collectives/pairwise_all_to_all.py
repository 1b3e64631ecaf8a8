"""All-to-all by pairs: in step s, rank i and rank s - i (modulo n) swap the parts that they hold for each other.

Every pair meets in exactly one step and swaps in place, so the buffer needs no copy. Every rank sends (n-1)/n of it.
"""

from __future__ import annotations

from deepseek.core.errors import ConfigError
from deepseek.distributed.collectives.messages import RankMessage, Step, check_counts, cut


def order_messages(world_size: int, num_elements: int, domain_size: int = 1) -> tuple[Step, ...]:
    """List the steps over buffers of `num_elements` of which part j is for rank j; pairs know no domains.

    >>> [len(step) for step in order_messages(3, 6)]
    [2, 2, 2]
    """
    check_counts(world_size, num_elements, domain_size)
    if num_elements % world_size:
        raise ConfigError(f"{num_elements} elements cannot be cut into {world_size} equal parts; pad the buffer")
    parts = cut(num_elements, world_size)
    steps = []
    for step in range(world_size):
        pairs = [(rank, (step - rank) % world_size) for rank in range(world_size)]
        steps.append(
            tuple(
                RankMessage(rank, partner, *parts[partner], parts[rank][0])
                for rank, partner in pairs
                if rank != partner and num_elements
            )
        )
    return tuple(step for step in steps if step)
