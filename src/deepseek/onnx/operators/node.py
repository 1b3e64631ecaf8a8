"""One node of an ONNX graph, as the functions that translate it see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from deepseek.onnx.files import UnsupportedOperatorError

Result: TypeAlias = Any  # a Value or a tuple of them; what fx gives is not typed
Translator: TypeAlias = "Callable[..., Result]"


@dataclass(frozen=True)
class Operator:
    """One node of an ONNX graph."""

    op_type: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    num_outputs: int = 1
    read: set[str] = field(default_factory=set)
    """Attributes that were asked for; one that nothing asks for is not followed."""

    def get(self, name: str, default: Any) -> Any:
        """Return an attribute; text as `str`."""
        self.read.add(name)
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return an attribute that is 0 or 1; raise for any other number, which readers take for either."""
        value = self.get(name, int(default))
        if value not in (0, 1):
            raise UnsupportedOperatorError(f"{name}={value!r} is not followed, only 0 and 1")
        return bool(value)

    def choose(self, name: str, *known: str) -> str:
        """Return an attribute that is one of the words `known`, of which the first is the default."""
        value = self.get(name, known[0])
        if value not in known:
            raise UnsupportedOperatorError(f"{name}={value!r} is not followed, only {', '.join(map(repr, known))}")
        return str(value)

    def allow(self, **followed: Any) -> None:
        """Raise unless each attribute named here is left out or has the one value that is followed."""
        for name, value in followed.items():
            if self.get(name, value) != value:
                raise UnsupportedOperatorError(f"{name}={self.get(name, value)!r} is not followed, only {value!r}")
