"""All-to-all with a part of its own length from every rank to every rank, around a ring or by pairs: for experts.

    ring        in step s, rank i sends to i + s and receives from i - s
    pairwise    in step s, rank i and rank s - i swap, so that both directions of one link are busy at once

Every rank sends exactly what it has: no part is padded to the longest. The parts of a sender lie one after the other
in its buffer, those of a receiver in another buffer, in rank order. `lengths[i][j]` is what rank i has for rank j; a
rank that knows only its own row and column gets its own messages right all the same, which is all that it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from deepseek.distributed.collectives.messages import RankMessage, Step

Lengths = Sequence[Sequence[int]]


def order_ring(lengths: Lengths) -> tuple[Step, ...]:
    """List the steps in which every rank sends to the one that is s further; the first keeps what is its own.

    >>> [len(step) for step in order_ring([[1, 2], [0, 3]])]
    [2, 1]
    """
    world_size = len(lengths)
    return _order(lengths, lambda rank, step: (rank + step) % world_size)


def order_pairs(lengths: Lengths) -> tuple[Step, ...]:
    """List the steps in which ranks swap with the partner whose number and theirs sum up to s.

    >>> [(message.source, message.target) for message in order_pairs([[0, 2], [1, 0]])[0]]
    [(0, 1), (1, 0)]
    """
    world_size = len(lengths)
    return _order(lengths, lambda rank, step: (step - rank) % world_size)


def _order(lengths: Lengths, find_target: Callable[[int, int], int]) -> tuple[Step, ...]:
    world_size = len(lengths)
    starts = [[0, *accumulate(row)] for row in lengths]
    target_starts = [[0, *accumulate(row[rank] for row in lengths)] for rank in range(world_size)]
    steps = []
    for step in range(world_size):
        pairs = [(rank, find_target(rank, step)) for rank in range(world_size)]
        steps.append(
            tuple(
                RankMessage(
                    source,
                    target,
                    starts[source][target],
                    starts[source][target] + lengths[source][target],
                    target_starts[target][source],
                )
                for source, target in pairs
                if lengths[source][target]
            )
        )
    return tuple(step for step in steps if step)
