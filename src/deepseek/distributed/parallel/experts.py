"""Expert parallelism: each rank holds some of the experts of a layer, and tokens travel to theirs and back.

    groups of tokens by expert -> all-to-all -> my experts run on the tokens of all ranks -> all-to-all -> answers

`spread_experts_` changes the experts of a router in place: each rank keeps its part of the stacked weights, and their
`run` and `forward` exchange tokens around what they did before, so that the router knows nothing of it. Without a
capacity, ranks exchange how many tokens go where first, and messages have uneven sizes; with one, every expert has the
same number of slots from every rank and no counts are needed.

Load factors are over the tokens of all data parallel ranks, as in a single process. A capacity counts on each rank by
itself: what is dropped depends on how tokens lie over the ranks.
Source: Lepikhin et al. 2021 (GShard).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek.core.divisors import explain_division
from deepseek.core.errors import ConfigError
from deepseek.distributed.differentiable_all_to_all import exchange_rows
from deepseek.distributed.reduction_algorithms import RankGroup
from deepseek.distributed.topology import RankTopology

Groups = Sequence[Tensor]
Travel = Callable[[Tensor, list[int], list[int]], Tensor]
"""Rows, how many go to each rank, and how many come from each -> the rows that came; gradients travel back."""


class Router(Protocol):
    """What a layer with experts has, `deepseek.nn.MoERouter` for one."""

    experts: Any
    """A module with `num_experts`, `forward` on groups of equal length and `run` on groups of any."""
    _balance: Callable[[Tensor, Tensor], None]


def spread_experts_(router: nn.Module, group: dist.ProcessGroup, *, algorithm: str = "native") -> list[nn.Parameter]:
    """Keep this rank's experts of `router` and let tokens travel over `group`; return the weights that are kept.

    `algorithm` is how they travel, one of `ALL_TO_ALLS`: `native`, `ring` or `pairwise`.
    Raises `ConfigError` for experts that are not stacked in one tensor per projection, and for a number of them that
    the ranks do not divide.
    """
    experts = cast("Router", router).experts
    num_ranks, num_experts = dist.get_world_size(group), experts.num_experts
    stacked = dict(experts.named_parameters(recurse=False))
    if not stacked or len(stacked) != len(list(experts.parameters())):
        raise ConfigError(
            f"ep={num_ranks} spreads experts that are stacked in one tensor per projection, and these are "
            f"{type(experts).__name__}; use SwiGLUExperts, or ep=1"
        )
    if num_experts % num_ranks:
        raise ConfigError(explain_division("ep", num_ranks, "experts", num_experts))
    rank = dist.get_rank(group)
    for name, weight in stacked.items():
        mine = weight.detach().chunk(num_ranks)[rank].clone()
        experts.register_parameter(name, nn.Parameter(mine, requires_grad=weight.requires_grad))
    # Who shares a host matters to the hierarchical algorithm alone, which is not offered here.
    travel = partial(
        exchange_rows, group=RankGroup(group, rank, RankTopology.of(["?"] * num_ranks)), algorithm=algorithm
    )
    experts.run = partial(_run_over_ranks, experts.run, group, travel)
    experts.forward = partial(_forward_over_ranks, experts.forward, num_ranks, travel)
    return list(experts.parameters())


def balance_over_ranks_(router: nn.Module, groups: Sequence[dist.ProcessGroup]) -> None:
    """Count the load of the experts of `router`, and what is dropped, over the tokens of all ranks of `groups`."""
    typed = cast("Router", router)
    num_tokens = torch.zeros((), dtype=torch.float64)

    def count(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        num_tokens.fill_(inputs[0].numel() / inputs[0].shape[-1])

    balance = typed._balance

    @torch.no_grad()
    def balance_over_ranks(load_factor_E: Tensor, dropped_share: Tensor) -> None:
        weight = num_tokens.to(load_factor_E.device, load_factor_E.dtype)
        sums = torch.cat([load_factor_E * weight, (dropped_share * weight)[None], weight[None]])
        for group in groups:
            dist.all_reduce(sums, group=group)
        balance(sums[:-2] / sums[-1], sums[-2] / sums[-1])

    router.register_forward_pre_hook(count)
    typed._balance = balance_over_ranks


def _run_over_ranks(
    run: Callable[[Groups], list[Tensor]], group: dist.ProcessGroup, travel: Travel, groups: Groups
) -> list[Tensor]:
    """Answer groups of any length, (n, D) each, one for every expert of all ranks."""
    num_ranks = dist.get_world_size(group)
    num_mine = len(groups) // num_ranks
    sent_RE = torch.tensor([len(x_nD) for x_nD in groups], device=groups[0].device).view(num_ranks, num_mine)
    received_RE = torch.empty_like(sent_RE)
    dist.all_to_all_single(received_RE, sent_RE, group=group)
    sent, received = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()
    x_ND = travel(torch.cat(list(groups)), sent, received)
    pieces = x_ND.split(received_RE.flatten().tolist())
    answers = run([torch.cat(pieces[expert::num_mine]) for expert in range(num_mine)])
    back = [answer.to(x_ND.dtype).split(received_RE[:, expert].tolist()) for expert, answer in enumerate(answers)]
    y_ND = torch.cat([back[expert][rank] for rank in range(num_ranks) for expert in range(num_mine)])
    return list(travel(y_ND, received, sent).split(sent_RE.flatten().tolist()))


def _forward_over_ranks(forward: Callable[[Tensor], Tensor], num_ranks: int, travel: Travel, x_ECD: Tensor) -> Tensor:
    """Answer groups of equal length, (E, C, D) for the experts of all ranks."""
    num_experts, capacity, size = x_ECD.shape
    even = [num_experts // num_ranks] * num_ranks
    x_RECD = travel(x_ECD, even, even).view(num_ranks, -1, capacity, size)
    y_ECD = forward(x_RECD.transpose(0, 1).reshape(-1, num_ranks * capacity, size))
    y_RECD = y_ECD.view(-1, num_ranks, capacity, size).transpose(0, 1).contiguous()
    return travel(y_RECD.view(num_experts, capacity, size), even, even)
