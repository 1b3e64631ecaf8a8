"""Reductions of one tensor by the message lists of `collectives/`, on a group whose ranks are on known hosts.

`DeepSeekComm` calls these. The list that is counted is the list that runs: `find_slices` is asked for both. "flat" is
torch's own algorithm and is not here.

A long buffer is cut into slices that take turns, step by step: the link carries one while another is added up, and two
levels overlap, so that the slow link does not wait for what happens inside the hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from deepseek.core.errors import ConfigError
from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.executing import (
    Combination,
    RankSteps,
    Slice,
    exchange_,
    exchange_slices_,
    select_steps,
)
from deepseek.distributed.collectives.messages import cut
from deepseek.distributed.topology import RankTopology

ALL_REDUCES = ("flat", "ring", "hierarchical", "tree")
SLICE_BYTES = 1 << 20
"""A slice is at least so long: below, a step's start costs more than the link gains by not waiting."""
MOST_SLICES = 4
_COMBINE: dict[str, Combination] = {
    "SUM": torch.Tensor.add_,
    "AVG": torch.Tensor.add_,
    "PRODUCT": torch.Tensor.mul_,
    "MAX": lambda mine, other: torch.maximum(mine, other, out=mine),
    "MIN": lambda mine, other: torch.minimum(mine, other, out=mine),
}


@dataclass(frozen=True)
class RankGroup:
    """A process group, this process's number in it, and the hosts of its ranks."""

    process_group: dist.ProcessGroup
    rank: int
    topology: RankTopology

    @property
    def size(self) -> int:
        """How many ranks it has."""
        return len(self.topology.hosts)

    @property
    def position(self) -> int:
        """The number that this rank has in schedules, where the ranks of a host are neighbors."""
        return self.topology.placement.index(self.rank)


@lru_cache(maxsize=1024)
def list_own_steps(name: str, size: int, num_elements: int, domain_size: int, position: int) -> RankSteps:
    """Return what one rank sends and receives in a collective."""
    return select_steps(COLLECTIVES[name](size, num_elements, domain_size), position)


def list_candidates(topology: RankTopology) -> tuple[str, ...]:
    """Return the all-reduces that make sense on a topology; two levels need several hosts with equally many ranks.

    >>> list_candidates(RankTopology.of(["a", "a", "b"]))
    ('flat', 'ring', 'tree')
    """
    has_levels = topology.num_hosts > 1 and topology.domain_size > 1
    return tuple(name for name in ALL_REDUCES if has_levels or name != "hierarchical")


def name_operator(op: dist.ReduceOp.RedOpType) -> str:
    """Return the name of a reduction that the message lists know."""
    name = str(op).rpartition(".")[2]
    if name not in _COMBINE:
        raise ConfigError(f"op={op} has no message list; use one of {', '.join(_COMBINE)}, or algorithm='flat'")
    return name


def all_reduce_(
    tensor: torch.Tensor, group: RankGroup, algorithm: str, operator: str, payload: torch.dtype | None
) -> None:
    """Reduce `tensor` in place over all ranks of the group.

    With `payload` numbers travel in that type and are added in the tensor's own; all ranks end with the same bits.
    """
    slices = find_slices(algorithm, group, tensor, payload)
    flat_N = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    placement, combine_ = group.topology.placement, _choose_combination(operator, payload)
    exchange_slices_(flat_N, slices, placement, group.process_group, combine_=combine_, payload=payload)
    if payload is not None:
        flat_N.copy_(flat_N.to(payload))  # a rank's own part never traveled; the others have it rounded
    if operator == "AVG":
        flat_N.div_(group.size)
    if not tensor.is_contiguous():
        tensor.copy_(flat_N.view(tensor.shape))


def find_slices(
    algorithm: str, group: RankGroup, tensor: torch.Tensor, payload: torch.dtype | None = None
) -> tuple[Slice, ...]:
    """Return this rank's messages of an all-reduce of `tensor`, by slice."""
    if algorithm == "hierarchical":
        check_levels(group.topology, "'ring' or 'auto'")
    domain_size = group.topology.domain_size if algorithm == "hierarchical" else 1
    name, num_bytes = f"{algorithm}_all_reduce", tensor.numel() * (payload or tensor.dtype).itemsize
    return tuple(
        (start, stop, list_own_steps(name, group.size, stop - start, domain_size, group.position))
        for start, stop in cut(tensor.numel(), 1 if tensor.is_cuda else count_slices(num_bytes))
    )


def count_slices(num_bytes: int) -> int:
    """Count the slices of a buffer, which NCCL, for whom messages have no tags, takes whole.

    >>> count_slices(1000), count_slices(3 << 20), count_slices(1 << 30)
    (1, 3, 4)
    """
    return min(max(num_bytes // SLICE_BYTES, 1), MOST_SLICES)


def check_levels(topology: RankTopology, others: str) -> None:
    """Raise `ConfigError`, which names `others` to use, where hosts do not have equally many ranks."""
    if topology.domain_size == 1 and topology.num_hosts != len(topology.hosts):
        raise ConfigError(
            f"algorithm='hierarchical' needs equally many ranks on each host, and ranks are on hosts "
            f"{list(topology.hosts)}; use {others}"
        )


def reduce_scatter(tensor: torch.Tensor, group: RankGroup, operator: str) -> torch.Tensor:
    """Return this rank's part, along the first dimension, of the reduction of `tensor` over the group, by a ring."""
    parts = tensor.reshape(group.size, -1)[list(group.topology.placement)]  # a copy, in the order of the schedule
    flat_N = parts.view(-1)
    steps = list_own_steps("ring_reduce_scatter", group.size, flat_N.numel(), 1, group.position)
    combine_ = _choose_combination(operator, None)
    exchange_(flat_N, flat_N, steps, group.topology.placement, group.process_group, combine_=combine_)
    own = parts[group.position].clone()
    if operator == "AVG":
        own.div_(group.size)
    return own.view(tensor.shape[0] // group.size, *tensor.shape[1:])


def all_gather(tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """Return the tensors of all ranks one after the other along the first dimension, by a ring."""
    placement = group.topology.placement
    parts = tensor.new_empty(group.size, tensor.numel())
    parts[group.position] = tensor.reshape(-1)
    flat_N = parts.view(-1)
    steps = list_own_steps("ring_all_gather", group.size, flat_N.numel(), 1, group.position)
    exchange_(flat_N, flat_N, steps, placement, group.process_group)
    in_rank_order = parts[[placement.index(rank) for rank in range(group.size)]]
    return in_rank_order.view(group.size * tensor.shape[0], *tensor.shape[1:])


def _choose_combination(operator: str, payload: torch.dtype | None) -> Combination:
    combine_ = _COMBINE[operator]
    if payload is None or combine_ is torch.Tensor.add_:
        return combine_
    return lambda mine, other: combine_(mine, other.to(mine.dtype))
