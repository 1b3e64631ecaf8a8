"""One pass over held-out data: batches that are counted before they are made, so that progress has an end.

batches = OnePass(10, make)
len(batches)                    10
for batch in batches: ...       what `make()` gives, from the beginning each time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

B = TypeVar("B")


@dataclass(frozen=True, eq=False)
class OnePass(Generic[B]):
    """Batches of one evaluation."""

    num_batches: int
    begin: Callable[[], Iterator[B]]
    """Makes them, from the first one on."""

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[B]:
        return self.begin()
