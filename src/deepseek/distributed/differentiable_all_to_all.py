"""All-to-all of rows with uneven splits, by any algorithm, with a backward: what experts send tokens with.

    native         torch's `all_to_all_single`
    ring, pairwise the message lists of `collectives/uneven_all_to_all.py`; nothing is padded, empty parts send nothing
    hierarchical   rows first go to the rank of their own host that has the number of the target in its host, then
                   across: n/g - 1 long messages over the network for every rank in place of n - g short ones

The gradient of rows that went out comes back by the same algorithm with the splits swapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from deepseek.distributed.collectives.executing import exchange_, select_steps
from deepseek.distributed.collectives.uneven_all_to_all import order_pairs, order_ring
from deepseek.distributed.reduction_algorithms import RankGroup, check_levels

ALL_TO_ALLS = ("native", "ring", "pairwise", "hierarchical")


def exchange_rows(
    rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: RankGroup, algorithm: str
) -> torch.Tensor:
    """Return the rows that arrive when `sent[j]` of `rows` go to rank j, and `received[i]` come from rank i.

    Rows go in rank order and arrive in rank order. It has a backward.
    """
    return _RowExchange.apply(rows, list(sent), list(received), group, algorithm)  # type: ignore[no-any-return,no-untyped-call]


class _RowExchange(torch.autograd.Function):
    """Rows one way, their gradients the other."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        rows: torch.Tensor,
        sent: list[int],
        received: list[int],
        group: RankGroup,
        algorithm: str,
    ) -> torch.Tensor:
        """Send the rows."""
        ctx.exchange = (sent, received, group, algorithm)  # type: ignore[attr-defined]
        return _EXCHANGES[algorithm](rows.contiguous(), sent, received, group)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        """Send the gradients back."""
        sent, received, group, algorithm = ctx.exchange  # type: ignore[attr-defined]
        return _EXCHANGES[algorithm](gradients[0].contiguous(), received, sent, group), None, None, None, None


def _exchange_natively(rows: torch.Tensor, sent: list[int], received: list[int], group: RankGroup) -> torch.Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows, received, sent, group=group.process_group)
    return arrived


def _exchange_by_ring(rows: torch.Tensor, sent: list[int], received: list[int], group: RankGroup) -> torch.Tensor:
    return _exchange_by_messages(rows, sent, received, group, range(group.size), order_ring)


def _exchange_by_pairs(rows: torch.Tensor, sent: list[int], received: list[int], group: RankGroup) -> torch.Tensor:
    return _exchange_by_messages(rows, sent, received, group, range(group.size), order_pairs)


def _exchange_by_messages(
    rows: torch.Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    group: RankGroup,
    members: Sequence[int],
    order: Callable[[list[list[int]]], tuple[tuple[object, ...], ...]],
) -> torch.Tensor:
    """Exchange rows among some ranks of the group, of which this one knows its own row and column of the lengths."""
    own, width = list(members).index(group.rank), math.prod(rows.shape[1:])
    lengths = [[0] * len(members) for _ in members]
    for index in range(len(members)):
        lengths[index][own] = received[index] * width
    lengths[own] = [count * width for count in sent]
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    steps = select_steps(order(lengths), own)  # type: ignore[arg-type]
    exchange_(rows.view(-1), arrived.view(-1), steps, members, group.process_group)
    return arrived


def _exchange_in_levels(rows: torch.Tensor, sent: list[int], received: list[int], group: RankGroup) -> torch.Tensor:
    """Inside the host to the rank with the target's number there, then across the hosts."""
    topology = group.topology
    check_levels(topology, "'ring' or 'pairwise'")
    local, placement = topology.domain_size, topology.placement
    by_host = [placement[first : first + local] for first in range(0, group.size, local)]
    own_host = next(host for host in by_host if group.rank in host)
    number = own_host.index(group.rank)
    lengths = _gather_lengths(sent, group)

    # Inside: rank `own_host[j]` gets what this rank has for the j-th rank of every host, host by host.
    bound = [[host[index] for host in by_host] for index in range(local)]
    outgoing = _take(rows, sent, [target for targets in bound for target in targets])
    inside_sent = [sum(sent[target] for target in targets) for targets in bound]
    inside_received = [sum(lengths[source][target] for target in bound[number]) for source in own_host]
    gathered = _exchange_by_messages(outgoing, inside_sent, inside_received, group, own_host, order_ring)

    # Across: the rank with this number on every host gets what this host has for it, rank by rank.
    pieces = [lengths[source][target] for source in own_host for target in bound[number]]
    hosts = len(by_host)
    by_target = [source * hosts + target for target in range(hosts) for source in range(local)]
    outgoing = _take(gathered, pieces, by_target)
    across_sent = [sum(lengths[source][target] for source in own_host) for target in bound[number]]
    across_received = [sum(lengths[source][group.rank] for source in host) for host in by_host]
    arrived = _exchange_by_messages(outgoing, across_sent, across_received, group, bound[number], order_ring)
    return _take(arrived, [received[rank] for rank in placement], [placement.index(rank) for rank in range(group.size)])


def _gather_lengths(sent: list[int], group: RankGroup) -> list[list[int]]:
    own = torch.tensor(sent, device=_device_of(group))
    lengths = own.new_empty(group.size, group.size)
    dist.all_gather(list(lengths), own, group=group.process_group)
    return lengths.tolist()


def swap_lengths(sent: Sequence[int], group: RankGroup) -> list[int]:
    """Return how many rows each rank has for this one, of which each said only what it sends."""
    own = torch.tensor(list(sent), device=_device_of(group))
    received = torch.empty_like(own)
    dist.all_to_all_single(received, own, group=group.process_group)
    return received.tolist()


def _device_of(group: RankGroup) -> str:
    return "cuda" if dist.get_backend(group.process_group) == "nccl" else "cpu"


def _take(rows: torch.Tensor, lengths: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    pieces = rows.split(list(lengths))
    return torch.cat([pieces[index] for index in order])


_EXCHANGES = {
    "native": _exchange_natively,
    "ring": _exchange_by_ring,
    "pairwise": _exchange_by_pairs,
    "hierarchical": _exchange_in_levels,
}
