"""The links between ranks, by class: the latency and bandwidth of the alpha-beta model (Hockney 1994)."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek.core.errors import ConfigError


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
