"""Reduce-scatter around a ring: after n-1 steps rank i holds the sum of part i (Thakur et al. 2005).

Every rank sends (n-1)/n of the buffer, the least that any algorithm can.
"""

from __future__ import annotations

from deepseek.distributed.collectives.messages import Step, check_counts, cut, pass_around


def order_messages(world_size: int, num_elements: int, domain_size: int = 1) -> tuple[Step, ...]:
    """List the steps over buffers of `num_elements` that are whole on every rank; a ring knows no domains.

    >>> len(order_messages(4, 8))
    3
    """
    check_counts(world_size, num_elements, domain_size)
    return tuple(pass_around(list(range(world_size)), cut(num_elements, world_size), -1, is_added=True))
