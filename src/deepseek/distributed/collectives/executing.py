"""Execute a schedule of messages: between processes with torch.distributed, or between arrays in one process.

`run_steps_` posts the sends and receives of one step together, so that rings and swaps cannot wait for each other,
and counts the bytes that its rank sends. `exchange_slices_` plays a schedule on several parts of a buffer in turns.
`apply_steps_` does the same on arrays and is what the property tests use. How long a schedule takes on given links is
said by `planning.estimate.communication.time_steps`.

Schedules number the ranks 0 to n-1 with the ranks of one domain next to each other. `placement[i]` is the rank of the
group that takes the part of number i, so the same schedule fits ranks that a launcher dealt out over hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepseek.distributed.collectives.messages import RankMessage, Step

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

RankSteps = tuple[tuple[tuple[RankMessage, ...], tuple[RankMessage, ...]], ...]
"""What one rank sends and receives in each step that it takes part in."""
Slice = tuple[int, int, RankSteps]
"""First and last (not included) element of a part of a buffer, and the steps for a buffer of that length."""
Combination = Callable[["torch.Tensor", "torch.Tensor"], object]


def select_steps(steps: Iterable[Step], rank: int) -> RankSteps:
    """Return the part of a schedule that `rank` runs.

    >>> [len(sent) + len(received) for sent, received in select_steps([(RankMessage(0, 1, 0, 5, 0),)], 2)]
    []
    """
    own = []
    for step in steps:
        sent = tuple(message for message in step if message.source == rank)
        received = tuple(message for message in step if message.target == rank)
        if sent or received:
            own.append((sent, received))
    return tuple(own)


def run_steps_(tensor_N: torch.Tensor, steps: Iterable[Step], group: dist.ProcessGroup | None = None) -> int:
    """Exchange the flat `tensor_N` with all ranks of `group` in place; returns the bytes that this rank sent."""
    import torch.distributed as dist

    placement = range(dist.get_world_size(group))
    return exchange_(tensor_N, tensor_N, select_steps(steps, dist.get_rank(group)), placement, group)


def exchange_(
    source_N: torch.Tensor,
    target_N: torch.Tensor,
    steps: RankSteps,
    placement: Sequence[int],
    group: dist.ProcessGroup | None,
    *,
    combine_: Combination | None = None,
    payload: torch.dtype | None = None,
) -> int:
    """Send parts of `source_N` and receive into `target_N` (the same tensor, or another); returns the bytes sent.

    What is added is combined by `combine_(mine, arrived)`, a sum where none is given. With `payload`, numbers travel in
    that type and are combined in the tensor's own.
    """
    _take_turns([_play(source_N, target_N, steps, placement, group, combine_, payload, tag=0)])
    return _count_sent(steps, (payload or target_N.dtype).itemsize)


def exchange_slices_(
    tensor_N: torch.Tensor,
    slices: Sequence[Slice],
    placement: Sequence[int],
    group: dist.ProcessGroup | None,
    *,
    combine_: Combination | None = None,
    payload: torch.dtype | None = None,
) -> None:
    """Play the steps of each slice on its part of `tensor_N`, in turns: while one slice is added up, others travel.

    All ranks have the same slices, and take them in the same order.
    """
    parts = ((tensor_N[start:stop], steps) for start, stop, steps in slices)
    _take_turns(
        [
            _play(part_N, part_N, steps, placement, group, combine_, payload, tag)
            for tag, (part_N, steps) in enumerate(parts)
        ]
    )


def _take_turns(players: Sequence[Iterator[list[dist.Work]]]) -> None:
    """Let each player post the messages of its next step when those of the one before have arrived."""
    posted = [(player, next(player, None)) for player in players]
    while posted:
        still_playing = []
        for player, works in posted:
            if works is not None:
                for work in works:
                    work.wait()
                still_playing.append((player, next(player, None)))
        posted = still_playing


def _play(
    source_N: torch.Tensor,
    target_N: torch.Tensor,
    steps: RankSteps,
    placement: Sequence[int],
    group: dist.ProcessGroup | None,
    combine_: Combination | None,
    payload: torch.dtype | None,
    tag: int,
) -> Iterator[list[dist.Work]]:
    """Post the messages of a step, yield what to wait for, add up what arrived, and go on with the next step."""
    import torch
    import torch.distributed as dist

    wire = payload or target_N.dtype
    for sent, received in steps:
        operations, arrived = [], []
        for message in received:
            if message.source == message.target:
                continue
            buffer = target_N.new_empty(message.num_elements, dtype=wire)
            operations.append(
                dist.P2POp(dist.irecv, buffer, group=group, tag=tag, group_peer=placement[message.source])
            )
            arrived.append((message, buffer))
        for message in sent:
            piece = source_N[message.start : message.stop].to(wire)
            if message.source == message.target:
                arrived.append((message, piece))
                continue
            operations.append(dist.P2POp(dist.isend, piece, group=group, tag=tag, group_peer=placement[message.target]))
        yield dist.batch_isend_irecv(operations) if operations else []
        for message, buffer in arrived:
            mine = target_N[message.target_start : message.target_start + message.num_elements]
            if message.is_added:
                (combine_ or torch.Tensor.add_)(mine, buffer)
            else:
                mine.copy_(buffer)


def _count_sent(steps: RankSteps, element_bytes: int) -> int:
    messages = (message for sent, _ in steps for message in sent if message.source != message.target)
    return sum(message.num_elements for message in messages) * element_bytes


def apply_steps_(buffers: Sequence[NDArray[np.float64]], steps: Iterable[Step]) -> list[int]:
    """Exchange the arrays of all ranks in place; returns the bytes that each rank sent."""
    sent = [0] * len(buffers)
    for step in steps:
        pieces = [(message, buffers[message.source][message.start : message.stop].copy()) for message in step]
        for message, piece in pieces:
            _receive_(buffers[message.target], message, piece)
            sent[message.source] += piece.nbytes
    return sent


def _receive_(buffer: NDArray[np.float64], message: RankMessage, piece: NDArray[np.float64]) -> None:
    target = buffer[message.target_start : message.target_start + message.num_elements]
    target[:] = target + piece if message.is_added else piece
