"""All-gather around a ring: rank i starts with part i, after n-1 steps all hold all parts (Thakur et al. 2005)."""

from __future__ import annotations

from deepseek.distributed.collectives.messages import Step, check_counts, cut, pass_around


def order_messages(world_size: int, num_elements: int, domain_size: int = 1) -> tuple[Step, ...]:
    """List the steps over buffers of `num_elements` of which rank i holds part i; a ring knows no domains.

    >>> len(order_messages(4, 8))
    3
    """
    check_counts(world_size, num_elements, domain_size)
    return tuple(pass_around(list(range(world_size)), cut(num_elements, world_size), 0, is_added=False))
