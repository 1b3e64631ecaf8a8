"""Execute a schedule of messages: between processes with torch.distributed, or between arrays in one process.

`run_steps_` posts the sends and receives of one step together, so that rings and swaps cannot wait for each other,
and counts the bytes that its rank sends. `apply_steps_` does the same on arrays and is what the property tests use.
How long a schedule takes on given links is said by `planning.estimate.communication.time_steps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepseek.distributed.collectives.messages import RankMessage, Step

if TYPE_CHECKING:
    import torch


def run_steps_(
    tensor_N: torch.Tensor, steps: Iterable[Step], group: torch.distributed.ProcessGroup | None = None
) -> int:
    """Exchange the flat `tensor_N` with all ranks of `group` in place; returns the bytes that this rank sent."""
    import torch.distributed as dist

    rank, sent_bytes = dist.get_rank(group), 0
    for step in steps:
        works, arrived = [], []
        for message in step:
            if message.source == rank:
                piece = tensor_N[message.start : message.stop].clone()
                works.append(dist.isend(piece, group=group, group_dst=message.target))
                sent_bytes += piece.numel() * piece.element_size()
            if message.target == rank:
                buffer = tensor_N.new_empty(message.num_elements)
                works.append(dist.irecv(buffer, group=group, group_src=message.source))
                arrived.append((message, buffer))
        for work in works:
            assert work is not None
            work.wait()
        for message, buffer in arrived:
            target = tensor_N[message.target_start : message.target_start + message.num_elements]
            target.add_(buffer) if message.is_added else target.copy_(buffer)
    return sent_bytes


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
