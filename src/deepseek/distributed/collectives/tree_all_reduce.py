"""All-reduce up and down a binomial tree: sums go to rank 0, and the whole comes back the same way.

2 ceil(log2 n) steps of the whole buffer: the fewest messages one after the other, so the choice for small buffers on
slow links, and 2 log2(n) times the bytes, so a bad one for large buffers.
"""

from __future__ import annotations

from dataclasses import replace

from deepseek.distributed.collectives import tree_broadcast
from deepseek.distributed.collectives.messages import Step


def order_messages(world_size: int, num_elements: int, domain_size: int = 1) -> tuple[Step, ...]:
    """List the steps over buffers of `num_elements` that are whole on every rank; a tree knows no domains.

    >>> [len(step) for step in order_messages(4, 8)]
    [2, 1, 1, 2]
    """
    down = tree_broadcast.order_messages(world_size, num_elements, domain_size)
    up = [
        tuple(replace(message, source=message.target, target=message.source, is_added=True) for message in step)
        for step in reversed(down)
    ]
    return (*up, *down)
