"""What `jit` was told, as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deepseek.compiler.passes.memory.recomputation import check_budget
from deepseek.compiler.passes.placement.devices import list_devices
from deepseek.core.errors import ConfigError

PRESENT = "present"
INDUCTOR = "inductor"
Backend = str | Callable[..., Any]
Devices = Sequence[str] | Literal["present"]


@dataclass(frozen=True)
class JitOptions:
    """The options of one call of `jit`, for all that it compiles."""

    fullgraph: bool = True
    """Whether what cannot become a part of the graph is an error; if not, it is a warning and a graph break."""
    backend: Backend = INDUCTOR
    """The backend of `torch.compile`, by its name or as a function."""
    dynamic: bool | None = None
    """Whether shapes are symbols, as for `torch.compile`."""
    options: dict[str, Any] | None = None
    """Settings of inductor, or what a backend that is a function takes as `options`, as for `torch.compile`."""
    optimize: bool = True
    """Whether graphs for inference are fused and freed of memory before the backend compiles them."""
    memory_budget: float | None = None
    """In training, the share in (0, 1] of what backward needs again that is kept; the rest is computed twice."""
    devices: Devices = ()
    """Devices over which graphs for inference are spread where that is faster than any one of them; or `present`."""

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            check_budget(self.memory_budget)
        if self.options and isinstance(self.backend, str) and self.backend != INDUCTOR:
            raise ConfigError(
                f"options were given with the backend {self.backend!r}, which reads none; leave them out, or take "
                f"backend={INDUCTOR!r}"
            )
        if isinstance(self.devices, str) and self.devices != PRESENT:
            raise ConfigError(
                f"devices={self.devices!r} is one name; give several, such as ('cpu', 'cuda'), or {PRESENT!r} for all"
            )

    @property
    def device_names(self) -> tuple[str, ...]:
        """Return the devices by name."""
        return list_devices() if self.devices == PRESENT else tuple(self.devices)
