"""A dict of names that answers an unknown one with the known ones.

For families that grow by name: the registry is filled where it is defined, and read with `[]`.

    MODELS: Registry[type[Module]] = Registry("architecture")
    MODELS.add("decoder", Decoder)
    MODELS["decodre"]   ->  ConfigError: unknown architecture 'decodre'; did you mean 'decoder'? ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names to values of one kind; `noun` is what an error calls them."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._values: dict[str, T] = {}

    def add(self, name: str, value: T) -> T:
        """Register `value` under `name` and return it; a name is given once."""
        if name in self._values:
            raise ConfigError(f"{self.noun} {name!r} is already registered; choose another name")
        self._values[name] = value
        return value

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            raise ConfigError(explain_unknown(self.noun, name, self._values))
        return self._values[name]

    def get(self, name: str, default: Any = None, /) -> Any:
        """The value of `name`, or `default` for an unknown one; `Mapping`'s own would let the error through."""
        return self._values.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
