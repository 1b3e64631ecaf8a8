"""All-reduce around a ring: a reduce-scatter, then an all-gather (Patarasuk and Yuan 2009).

Every rank sends 2 (n-1)/n of the buffer in 2 (n-1) messages: the fewest bytes, the most messages.
"""

from __future__ import annotations

from deepseek.distributed.collectives import ring_all_gather, ring_reduce_scatter
from deepseek.distributed.collectives.messages import Step


def order_messages(world_size: int, num_elements: int, domain_size: int = 1) -> tuple[Step, ...]:
    """List the steps over buffers of `num_elements` that are whole on every rank; a ring knows no domains.

    >>> len(order_messages(4, 8))
    6
    """
    summed = ring_reduce_scatter.order_messages(world_size, num_elements, domain_size)
    return summed + ring_all_gather.order_messages(world_size, num_elements, domain_size)
