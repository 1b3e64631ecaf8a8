"""The parts of a schedule: messages, and how a buffer is cut into one part per rank.

Buffers are cut as evenly as whole elements allow: the first parts are one element longer, and parts may be empty, so
that any number of ranks works on any buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from deepseek.core.errors import ConfigError


@dataclass(frozen=True)
class RankMessage:
    """Elements `start` to `stop` of the sender go to `target_start` of the receiver, which adds or takes them."""

    source: int
    target: int
    start: int
    stop: int
    target_start: int
    is_added: bool = False

    @property
    def num_elements(self) -> int:
        """How many elements travel."""
        return self.stop - self.start


Step = tuple[RankMessage, ...]


def cut(num_elements: int, parts: int) -> list[tuple[int, int]]:
    """Start and stop of each of `parts` pieces.

    >>> cut(7, 3)
    [(0, 3), (3, 5), (5, 7)]
    """
    size, longer = divmod(num_elements, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return list(itertools.pairwise(starts))


def check_counts(world_size: int, num_elements: int, domain_size: int = 1) -> None:
    """Refuse groups that do not exist."""
    if world_size < 1 or num_elements < 0:
        raise ConfigError(f"{world_size} ranks with {num_elements} elements exchange nothing; give at least one rank")
    if domain_size < 1 or world_size % domain_size:
        raise ConfigError(f"domains of {domain_size} ranks do not divide world_size={world_size}; choose a divisor")


def pass_around(ranks: list[int], parts: list[tuple[int, int]], first: int, *, is_added: bool) -> list[Step]:
    """List one way around a ring: in each of n-1 steps every rank sends one part to its neighbor.

    In step s the rank at index i sends part `i + first - s`; with `first=-1` and adding, index i ends up with the sum
    of part i, and with `first=0` and copying, all ranks end up with all parts.
    """
    size = len(ranks)
    steps = []
    for step in range(size - 1):
        sent = [(index, parts[(index + first - step) % size]) for index in range(size)]
        steps.append(
            tuple(
                RankMessage(ranks[index], ranks[(index + 1) % size], start, stop, start, is_added)
                for index, (start, stop) in sent
                if stop > start
            )
        )
    return steps


def merge_steps(groups: Iterable[list[Step]]) -> list[Step]:
    """Merge schedules of disjoint groups of equal length, side by side."""
    return [tuple(message for step in steps for message in step) for steps in zip(*groups, strict=True)]


def count_sent(steps: Iterable[Step], rank: int) -> int:
    """Count elements that `rank` sends.

    >>> count_sent([(RankMessage(0, 1, 0, 5, 0),)], 0)
    5
    """
    return sum(message.num_elements for step in steps for message in step if message.source == rank)
