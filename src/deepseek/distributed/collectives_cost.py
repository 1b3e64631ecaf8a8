"""Seconds that a collective takes: latency times messages plus bytes over bandwidth, by link class and algorithm.

A group of `size` ranks sits on `spread` scale-up domains, `size / spread` ranks in each. Inside a domain a rank sends at
the scale-up bandwidth; between domains all ranks of the group in one domain share their network cards, one each, so a
ring leaves a domain at `size / spread` times one card's bandwidth (NCCL's rings, one per rail). Small messages never fill
a link: the ramp adds the time of `scale_up_ramp_bytes` at full speed times a factor that saturates with the size.

    ring all-reduce          2 (n-1) alpha + 2 (n-1)/n S / B
    tree all-reduce          2 log2(n) alpha + 2 S / B
    reduce-scatter, gather   half of the ring
    hierarchical             reduce-scatter inside, all-reduce of S/g across, all-gather inside
    all-to-all               (n-1) alpha + (n-1)/n S / B, bytes that stay in the domain at scale-up speed

Sources: Thakur et al. 2005 (rings), Sanders et al. 2009 (two trees), nccl-tests' definition of bus bandwidth. The forms
are tested against a simulation that moves every message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek.distributed.columns import Array, Columns


@dataclass(frozen=True)
class Group:
    """`size` ranks on `spread` scale-up domains."""

    size: Array
    spread: Array

    @property
    def inside(self) -> Array:
        """Ranks of the group in one domain."""
        return np.maximum(self.size / self.spread, 1.0)


def place_group(c: Columns, size: Array, stride: Array) -> Group:
    """The group of `size` ranks that are `stride` apart in rank order."""
    per_domain = np.maximum(np.floor(c.scale_up_size / stride), 1.0)
    return Group(size, np.maximum(np.ceil(size / np.minimum(per_domain, size)), 1.0))


def _scale_up_bandwidth(c: Columns) -> Array:
    return c.scale_up_bandwidth * c.scale_up_fraction


def _network_bandwidth(c: Columns) -> Array:
    return c.network_bandwidth * c.network_fraction


def _ring_bandwidth(c: Columns, group: Group) -> Array:
    across = _network_bandwidth(c) * group.inside
    return np.where(group.spread > 1, np.minimum(_scale_up_bandwidth(c), across), _scale_up_bandwidth(c))


def _ramp_s(c: Columns, num_bytes: Array, bandwidth: Array) -> Array:
    """Time lost while links fill: grows with the message, up to that of `scale_up_ramp_bytes`."""
    filled = num_bytes / (num_bytes + c.scale_up_ramp_bytes)
    return filled * c.scale_up_ramp_bytes / bandwidth


def scatter_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """Reduce-scatter, or all-gather, of a full buffer of `num_bytes` over `group`."""
    bandwidth = _ring_bandwidth(c, group)
    steps = (group.inside - 1) * c.scale_up_alpha_s + (group.spread - 1) * c.network_alpha_s
    moved = (group.size - 1) / group.size * num_bytes
    seconds = steps + moved / bandwidth + 0.5 * _ramp_s(c, num_bytes, bandwidth)
    return np.where((group.size > 1) & (num_bytes > 0), seconds, 0.0)


def ring_all_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """All-reduce as two passes around a ring."""
    return 2 * scatter_reduce_s(c, num_bytes, group)


def tree_all_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """All-reduce up and down two trees, pipelined."""
    bandwidth = _ring_bandwidth(c, group)
    hops = np.ceil(np.log2(group.inside)) * c.scale_up_alpha_s + np.ceil(np.log2(group.spread)) * c.network_alpha_s
    seconds = 2 * hops + 2 * num_bytes / bandwidth + _ramp_s(c, num_bytes, bandwidth)
    return np.where((group.size > 1) & (num_bytes > 0), seconds, 0.0)


def hierarchical_all_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """Reduce-scatter inside each domain, all-reduce of the pieces across, all-gather inside."""
    inner = Group(group.inside, np.ones_like(group.spread))
    outer = Group(group.spread, group.spread)
    return 2 * scatter_reduce_s(c, num_bytes, inner) + ring_all_reduce_s(c, num_bytes / group.inside, outer)


def all_reduce_s(c: Columns, num_bytes: Array, group: Group) -> Array:
    """All-reduce by the algorithm that is fastest for this size and group."""
    flat = np.minimum(ring_all_reduce_s(c, num_bytes, group), tree_all_reduce_s(c, num_bytes, group))
    return np.where(group.spread > 1, np.minimum(flat, hierarchical_all_reduce_s(c, num_bytes, group)), flat)


def all_to_all_s(c: Columns, num_bytes: Array, group: Group, remote_bytes: Array | None = None) -> Array:
    """Every rank sends `num_bytes` in equal parts to all ranks of `group`.

    `remote_bytes` is what leaves the domain, if less than the equal parts say (tokens sent once per node).
    """
    inside = (group.inside - 1) / group.size * num_bytes / _scale_up_bandwidth(c)
    leaving = (group.size - group.inside) / group.size * num_bytes if remote_bytes is None else remote_bytes
    across = leaving / _network_bandwidth(c)
    steps = (group.inside - 1) * c.scale_up_alpha_s + (group.spread - 1) * c.network_alpha_s
    seconds = steps + np.maximum(inside, across) + 0.5 * _ramp_s(c, num_bytes, _scale_up_bandwidth(c))
    return np.where((group.size > 1) & (num_bytes > 0), seconds, 0.0)


def send_s(c: Columns, num_bytes: Array, is_remote: Array) -> Array:
    """One message to a neighbour, inside a domain or across the network."""
    inside = c.scale_up_alpha_s + num_bytes / _scale_up_bandwidth(c)
    across = c.network_alpha_s + num_bytes / _network_bandwidth(c)
    return np.where(is_remote, across, inside)
