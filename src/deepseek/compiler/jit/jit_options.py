"""What `jit` was told, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepseek.compiler.passes.memory.recomputation import check_budget

Backend = str | Callable[..., Any]


@dataclass(frozen=True)
class JitOptions:
    """The options of one call of `jit`, for all that it compiles."""

    fullgraph: bool = True
    """Whether what cannot become a part of the graph is an error; if not, it is a warning and a graph break."""
    backend: Backend = "inductor"
    """The backend of `torch.compile`, by its name or as a function."""
    dynamic: bool | None = None
    """Whether shapes are symbols, as for `torch.compile`."""
    options: dict[str, Any] | None = None
    """Options of the backend, as for `torch.compile`."""
    optimize: bool = True
    """Whether graphs for inference are fused and freed of memory before the backend compiles them."""
    memory_budget: float | None = None
    """In training, the share in (0, 1] of what backward needs again that is kept; the rest is computed twice."""

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            check_budget(self.memory_budget)
