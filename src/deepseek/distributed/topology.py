"""The links between ranks, by class, and which ranks share a host.

A link is a latency and a bandwidth, as in the alpha-beta model (Hockney 1994). A topology comes from the hosts that
ranks name, from measured latencies between all pairs, or from the user.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from deepseek.core.errors import ConfigError

LEAST_GAP = 2.0  # a network is slower than a host's own memory by far more; noise is less


@dataclass(frozen=True)
class LinkClass:
    """A kind of link: `alpha_s` seconds before the first byte, then `bandwidth_bytes_per_s` in each direction.

    >>> LinkClass(alpha_s=5e-6, bandwidth_bytes_per_s=25e9).send_s(25_000)
    6e-06
    """

    alpha_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        """A link without speed cannot be estimated."""
        if not self.bandwidth_bytes_per_s > 0 or self.alpha_s < 0:
            raise ConfigError(
                f"a link with alpha_s={self.alpha_s!r} and bandwidth_bytes_per_s={self.bandwidth_bytes_per_s!r} cannot "
                "carry a message; give a latency of at least 0 and a bandwidth above 0"
            )

    def send_s(self, num_bytes: float) -> float:
        """Return seconds until a message of `num_bytes` has arrived."""
        return self.alpha_s + num_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True)
class RankTopology:
    """Which host each rank is on; ranks of one host reach each other over faster links.

    >>> dealt_out = RankTopology.of(["a", "b", "a", "b"])
    >>> dealt_out.placement, dealt_out.domain_size
    ((0, 2, 1, 3), 2)
    """

    hosts: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str | int]) -> RankTopology:
        """Number the hosts in the order in which ranks name them."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return cls(tuple(numbers[name] for name in names))

    @classmethod
    def from_latencies(cls, latencies_s: Sequence[Sequence[float]]) -> RankTopology:
        """Find the hosts from measured seconds of a message between all pairs, which are of two kinds or of one.

        The pairs are parted at the widest gap between neighboring values, if it is at least a factor of
        `LEAST_GAP`; ranks that fast pairs connect share a host.
        """
        size = len(latencies_s)
        pairs = sorted(latencies_s[one][two] for one in range(size) for two in range(one))
        gaps = [(high / low, low) for low, high in itertools.pairwise(pairs)]
        widest, fastest_s = max(gaps, default=(1.0, math.inf))
        if widest < LEAST_GAP:
            return cls((0,) * size)
        hosts = list(range(size))
        for one in range(size):
            for two in range(one):
                if latencies_s[one][two] <= fastest_s:
                    old, new = hosts[one], hosts[two]
                    hosts = [new if host == old else host for host in hosts]
        return cls.of(hosts)

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The ranks with those of one host next to each other."""
        return tuple(sorted(range(len(self.hosts)), key=lambda rank: (self.hosts[rank], rank)))

    @cached_property
    def num_hosts(self) -> int:
        """How many hosts there are."""
        return len(set(self.hosts))

    @cached_property
    def domain_size(self) -> int:
        """Ranks of each host, and 1 where the hosts do not have the same number."""
        counts = {self.hosts.count(host) for host in set(self.hosts)}
        return counts.pop() if len(counts) == 1 else 1

    def select(self, ranks: Sequence[int]) -> RankTopology:
        """Return the topology of some of the ranks, numbered from 0."""
        return RankTopology.of([self.hosts[rank] for rank in ranks])
