"""Old call sites on a new model: `VersionAdapter(model, "v3.5").forward(x)`.

Each generation called its models in one way. The adapter makes that call on today's model and warns with what to write
instead; it computes nothing itself, so it costs one attribute look-up. An unknown generation is an error here, where
the documents' adapter returned `None`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from deepseek.compat.generations import find_generation
from deepseek.core.errors import ConfigError

# Generation -> the model's attribute that its code calls. All others, and all that come, call the model itself.
_ENTRY_POINTS = {"3.5": "flash_attn"}
_CURRENT = (5, 0)


class VersionAdapter:
    """A model behind the calling convention of generation `version`.

    Raises `ConfigError` for an unknown generation, for one that is planned and so has no code to adapt, and for a model
    that cannot be called. Code of generation 3.5 runs the model's `flash_attn`; a model without one is called as a
    whole, with a warning.

    >>> VersionAdapter(len, "v5.0").forward("abc")
    3
    """

    def __init__(self, model: Callable[..., Any], version: str) -> None:
        self.model = model
        self.generation = find_generation(version)
        if self.generation.status == "planned":
            raise ConfigError(
                f"generation {self.generation.name} is planned; name the one that your code was written for"
            )
        if not callable(model):
            raise ConfigError(f"the model is a {type(model).__name__}, which cannot be called; give a module")

    @property
    def flash_attn(self) -> Callable[..., Any] | None:
        """Return the model's fused attention, `None` where it has none."""
        attribute = getattr(self.model, "flash_attn", None)
        return attribute if callable(attribute) else None

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the model as the generation's code calls it, and return its answer."""
        entry_point = _ENTRY_POINTS.get(self.generation.name)
        fused = self.flash_attn if entry_point == "flash_attn" else None
        if entry_point is not None and fused is None:
            warnings.warn(
                f"{type(self.model).__name__} has no {entry_point}; the whole model is called and picks its own kernel",
                stacklevel=2,
            )
        elif self.generation.version < _CURRENT:
            call = f"model.{entry_point}(x)" if entry_point else "VersionAdapter(model, version).forward(x)"
            warnings.warn(
                f"{call} is the convention of generation {self.generation.name}; call model(x), as generation 5.0 does "
                "(`deepseek-migrate --check` finds the other places)",
                DeprecationWarning,
                stacklevel=2,
            )
        return (fused or self.model)(*arguments, **keywords)

    __call__ = forward
