"""What `dynamic_graph` is told, and what it tells: its options and its explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from deepseek.compiler.dynamic_shapes.buckets import Cost
from deepseek.compiler.dynamic_shapes.length_policy import Strategy
from deepseek.compiler.dynamic_shapes.regions import Backend, Compilation
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown


@dataclass(frozen=True)
class DynamicOptions:
    """How a function is run for changing shapes; the arguments of `dynamic_graph`, which explains them."""

    mask: str | None = None
    dims: Mapping[str, int | Sequence[int]] | None = None
    pad_value: float | Mapping[str, float] | None = None
    strategy: Strategy = "auto"
    boundaries: Sequence[int] = ()
    max_compilations: int = 8
    min_length: int | None = None
    max_length: int | None = None
    num_checks: int = 2
    tolerance: float | None = None
    cost: Cost | None = None
    backend: str | Backend = "inductor"
    cache: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ConfigError(explain_unknown("strategy", self.strategy, get_args(Strategy)))
        if self.max_compilations < 1:
            raise ConfigError(f"max_compilations={self.max_compilations} compiles nothing; give at least 1")
        if (self.strategy == "bucketed" or self.boundaries) and not self.may_pad:
            raise ConfigError(
                "buckets pad, and padding changes numbers unless the function ignores it; "
                "name its mask with mask=, or give pad_value= if what is padded does not matter"
            )
        if isinstance(self.pad_value, Mapping) and self.pad_value.get(self.mask or "", 0) != 0:
            raise ConfigError(
                f"pad_value pads the mask {self.mask!r} with {self.pad_value[self.mask or '']:g}, and positions that "
                "are padded do not count; leave the mask out of pad_value"
            )
        if self.num_checks < 1:
            raise ConfigError("num_checks=0 would trust padding blindly; give at least 1")
        if any(boundary < 1 for boundary in self.boundaries):
            raise ConfigError(f"boundaries={tuple(self.boundaries)} must be lengths of at least 1")

    @property
    def may_pad(self) -> bool:
        return self.mask is not None or self.pad_value is not None


@dataclass(frozen=True)
class DynamicExplanation:
    """The answer of `explain()`; printed, it is text."""

    target: str
    strategy: str
    reason: str
    blocks: tuple[str, ...]
    boundaries: tuple[int, ...]
    compilations: tuple[Compilation, ...]
    max_compilations: int
    num_calls: int
    num_pieces: int
    padding_share: float
    padding_share_before: float
    num_cache_hits: int
    num_loaded: int

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.strategy} lengths; {self.reason}"]
        lines += [f"  compiled once: {block}" for block in self.blocks]
        lines += [f"  boundaries: {', '.join(map(str, self.boundaries))}"] if self.boundaries else []
        lines.append(f"  compilations: {len(self.compilations)} of at most {self.max_compilations}")
        lines += [f"    {compilation}" for compilation in self.compilations]
        lines.append(f"  graphs loaded from disk: {self.num_loaded}, used: {self.num_cache_hits}")
        lines.append(
            f"  {self.num_calls} calls ran as {self.num_pieces} pieces; "
            f"{self.padding_share:.0%} of what ran was padding, {self.padding_share_before:.0%} of what came in"
        )
        return "\n".join(lines)
