"""Seconds that a collective takes: latency times messages plus bytes over bandwidth, by link class and algorithm.

A group of `size` ranks sits on `spread` scale-up domains, `size / spread` ranks in each. Inside a domain a rank sends
at the scale-up bandwidth; between domains all ranks of the group in one domain share their network cards, one each,
so a ring leaves a domain at `size / spread` times one card's bandwidth (NCCL's rings, one per rail).

    ring all-reduce          2 (n-1) alpha + 2 (n-1)/n S / B
    tree all-reduce          2 log2(n) alpha + 2 S / B
    reduce-scatter, gather   half of the ring
    hierarchical             rings inside, S/g across on every rail, chunk by chunk so that the slower of the two counts
    in the switch            S (1 + 1/n) / B: every rank sends its data once and receives the sum once
    all-to-all               (n-1) alpha + (n-1)/n S / B, bytes that stay in the domain at scale-up speed;
                             one alpha where a switch takes all messages at once

To each is added what it costs to start (`collective_s`) and to fill the chain (a chunk per hop between domains).
Sources: Thakur et al. 2005 (rings), Sanders et al. 2009 (two trees), nccl-tests' definition of bus bandwidth. The forms
are tested against a simulation that moves every message.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from deepseek.distributed.collectives.messages import Step
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate.columns import MESH, PAIRS, SWITCH, Array, Columns, Flags

# Disjoint rings through 2 to 8 devices of the hybrid cube mesh, of the six links that each device has.
_MESH_RINGS = np.array([6.0, 6.0, 1.0, 2.0, 4.0, 2.0, 2.0, 4.0, 6.0])
_SWITCH_OVERHEAD = 1.2  # multimem stores and loads against plain copies
_CHUNK_BYTES = 1e7  # buffers of all channels of a communicator (NCCL: 4 MiB a channel, two or three of them busy)
_SCATTERED = 0.85  # many small peers at once reach less of a link than one ring neighbour


@dataclass(frozen=True)
class Group:
    """`size` ranks on `spread` scale-up domains."""

    size: Array
    spread: Array

    @property
    def inside(self) -> Array:
        """Ranks of the group in one domain."""
        return np.maximum(self.size / self.spread, 1.0)


def form_group(c: Columns, size: Array, stride: Array) -> Group:
    """Return the group of `size` ranks that are `stride` apart in rank order."""
    per_domain = np.maximum(np.floor(c.scale_up_size / stride), 1.0)
    return Group(size, np.maximum(np.ceil(size / np.minimum(per_domain, size)), 1.0))


def _scale_up_bandwidth(c: Columns, ranks: Array) -> Array:
    few = np.clip(ranks, 2, 8)
    pairs = (few - 1) / 7.0
    mesh = _MESH_RINGS[few.astype(np.intp)] / 6.0
    share = np.where(c.topology == PAIRS, pairs, np.where(c.topology == MESH, mesh, 1.0))
    return c.scale_up_bandwidth * c.scale_up_fraction * share


def _network_bandwidth(c: Columns) -> Array:
    return c.network_bandwidth * c.network_fraction


def _ring_bandwidth(c: Columns, group: Group) -> Array:
    inside = _scale_up_bandwidth(c, group.inside)
    across = _network_bandwidth(c) * group.inside
    return np.where(group.spread > 1, np.minimum(np.where(group.inside > 1, inside, across), across), inside)


def _fill_s(c: Columns, num_bytes: Array, bandwidth: Array) -> Array:
    """Time until a chunk has passed one hop; a small message is one chunk."""
    return np.minimum(num_bytes, _CHUNK_BYTES) / bandwidth


def _only_where(c: Columns, num_bytes: Array, group: Group, seconds: Array) -> Array:
    return np.where((group.size > 1) & (num_bytes > 0), c.collective_s + seconds, 0.0)


def _pass_ring_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    bandwidth = _ring_bandwidth(c, group)
    hop = c.network_alpha_s + _fill_s(c, num_bytes / group.size, bandwidth)
    steps = group.spread * (group.inside - 1) * c.scale_up_alpha_s + (group.spread - 1) * hop
    return steps + (group.size - 1) / group.size * num_bytes / bandwidth


def scatter_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """Time a reduce-scatter, or an all-gather, of a full buffer of `num_bytes` over `group`."""
    return _only_where(c, num_bytes, group, _pass_ring_s(c, num_bytes, group))


def reduce_scatter_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """Time a reduce-scatter by what carries it: Gloo, between processors, sums all of the buffer on every rank."""
    return np.where(c.is_host > 0, ring_all_reduce_s(c, num_bytes, group), scatter_reduce_s(c, num_bytes, group))


def ring_all_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """Time an all-reduce as two passes around a ring."""
    return _only_where(c, num_bytes, group, 2 * _pass_ring_s(c, num_bytes, group))


def tree_all_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """Time an all-reduce up and down two trees, pipelined."""
    bandwidth = _ring_bandwidth(c, group)
    up = np.ceil(np.log2(group.spread)) * (c.network_alpha_s + _fill_s(c, num_bytes, bandwidth))
    chain = (group.inside - 1) * c.scale_up_alpha_s
    return _only_where(c, num_bytes, group, 2 * (up + chain) + 2 * num_bytes / bandwidth)


def hierarchical_all_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """Time rings inside the domains and across them at once, chunk by chunk; inside the switch where it can add."""
    inner = Group(group.inside, np.ones_like(group.spread))
    ring = 2 * (inner.size - 1) / inner.size * num_bytes / _scale_up_bandwidth(c, inner.size)
    within = np.where(c.has_switch_reduction > 0, np.minimum(ring, _switch_s(c, num_bytes, inner)), ring)
    network = _network_bandwidth(c)
    across = 2 * (group.spread - 1) / group.spread * num_bytes / group.inside / network
    hops = np.ceil(np.log2(group.spread))
    steps = np.where(c.has_switch_reduction > 0, np.minimum(group.inside - 1, 1.0), group.inside - 1)
    latency = steps * c.scale_up_alpha_s + hops * (c.network_alpha_s + _fill_s(c, num_bytes / group.inside, network))
    return _only_where(c, num_bytes, group, 2 * latency + np.maximum(within, across))


def _switch_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    return _SWITCH_OVERHEAD * num_bytes * (1 + 1 / group.size) / (c.scale_up_bandwidth * c.scale_up_fraction)


def all_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """Time an all-reduce by the algorithm that is fastest for this size and group."""
    flat = np.minimum(ring_all_reduce_s(c, num_bytes, group), tree_all_reduce_s(c, num_bytes, group))
    return np.minimum(flat, hierarchical_all_reduce_s(c, num_bytes, group))


def all_to_all_s(c: Columns, num_bytes: Array, group: Group, remote_bytes: Array | None = None) -> Array:
    """Time an exchange in which every rank sends `num_bytes` in equal parts to all ranks of `group`.

    `remote_bytes` is what leaves the domain, if less than the equal parts say (tokens sent once per node).
    """
    inside = (group.inside - 1) / group.size * num_bytes / (_SCATTERED * _scale_up_bandwidth(c, group.inside))
    leaving = (group.size - group.inside) / group.size * num_bytes if remote_bytes is None else remote_bytes
    across = leaving / _network_bandwidth(c)
    messages = np.where(c.topology == SWITCH, 1.0, group.inside - 1)
    steps = messages * c.scale_up_alpha_s + (group.spread - 1) * c.network_alpha_s
    return _only_where(c, num_bytes, group, steps + np.maximum(inside, across))


def send_s(c: Columns, num_bytes: Array, is_remote: Flags) -> Array:
    """Time one message to a neighbor, inside a domain or across the network."""
    inside = c.scale_up_alpha_s + num_bytes / _scale_up_bandwidth(c, np.full_like(num_bytes, 8.0))
    across = c.network_alpha_s + num_bytes / _network_bandwidth(c)
    return np.where(is_remote, across, inside)


def time_steps(
    steps: Iterable[Step], element_bytes: int, domain_size: int, scale_up: LinkClass, network: LinkClass
) -> float:
    """Time a schedule whose messages stay inside domains of `domain_size` ranks or cross between them.

    Each step lasts as long as its slowest message; ranks that leave a domain each have a network card of their own.
    """
    total = 0.0
    for step in steps:
        seconds = [
            (scale_up if message.source // domain_size == message.target // domain_size else network).send_s(
                message.num_elements * element_bytes
            )
            for message in step
        ]
        total += max(seconds, default=0.0)
    return total
