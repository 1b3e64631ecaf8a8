"""All-reduce in two levels: rings inside each domain, and rings across domains for the part that each rank then owns.

Reduce-scatter inside (scale-up links), all-reduce of one part across (network), all-gather inside. Between domains
every rank sends only 2 (d-1)/d of its part, so the network carries as many times less as a domain has ranks, and a
message waits for d-1 hops of the network, not for all n-1 of a flat ring.
"""

from __future__ import annotations

from deepseek.distributed.collectives.messages import Step, check_counts, cut, merge_steps, pass_around


def order_messages(world_size: int, num_elements: int, domain_size: int = 1) -> tuple[Step, ...]:
    """List the steps over buffers of `num_elements` on domains of `domain_size` neighbouring ranks.

    >>> len(order_messages(8, 64, 4))
    8
    """
    check_counts(world_size, num_elements, domain_size)
    domains = [list(range(first, first + domain_size)) for first in range(0, world_size, domain_size)]
    parts = cut(num_elements, domain_size)
    summed = merge_steps([pass_around(domain, parts, -1, is_added=True) for domain in domains])
    across = merge_steps([_reduce_across(domains, index, parts[index]) for index in range(domain_size)])
    gathered = merge_steps([pass_around(domain, parts, 0, is_added=False) for domain in domains])
    return tuple(summed + across + gathered)


def _reduce_across(domains: list[list[int]], index: int, part: tuple[int, int]) -> list[Step]:
    ranks = [domain[index] for domain in domains]
    start, stop = part
    pieces = [(start + low, start + high) for low, high in cut(stop - start, len(ranks))]
    return pass_around(ranks, pieces, -1, is_added=True) + pass_around(ranks, pieces, 0, is_added=False)
