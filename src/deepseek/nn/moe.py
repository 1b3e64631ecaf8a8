"""Mixture of experts: every token is answered by its `top_k` best experts, weighted by how well they fit.

    scores -> top-k -> tokens grouped by expert -> each expert runs once on its group -> weighted sum back per token

- Gate weights are the softmax scores of the chosen experts, normalized to sum to one. With `top_k=1` the weight is one
  whatever the gate says, so the gate gets no gradient; choose at least two where it is meant to learn.
- *Capacity balancing* works on the load factor of an expert, lambda = its load / the average load. A bias that falls
  while lambda is above one steers the choice (not the weights) towards idle experts, and with a `capacity_factor`
  no expert takes more than that multiple of the average load: first choices go first, the rest is dropped for that
  expert. The bound also makes every shape static, which is what lets a compiler take the whole layer.
- *Progressive routing*: a coarse softmax picks candidates, and a per-expert refinement decides among them.

Shapes: N tokens, D hidden, E experts, K choices per token, C capacity, S = E * C slots, F ffn. Cost: K
experts a token, plus one sort (dropless) or one running count (with capacity).
Sources: Shazeer et al. 2017 (gating); Lepikhin et al. 2021 (capacity); Wang et al. 2024 (bias instead of a loss).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError


class MoEConfig(Config):
    """Mixture-of-experts feed-forward blocks of a decoder."""

    num_experts: int = Field(default=8, ge=1)
    """Experts in each layer."""
    top_k: int = Field(default=2, ge=1)
    """Experts that answer each token."""
    ffn_size: int = Field(default=256, ge=1)
    """Hidden units of one expert."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Largest load factor of an expert in training, as a multiple of the average load; none drops no token."""
    balance_rate: float = Field(default=0.0, ge=0)
    """How far the selection bias of an expert falls in each training pass, per unit of load factor above one."""
    num_candidates: int | None = Field(default=None, ge=1)
    """Experts that survive the coarse softmax of progressive routing; none routes in one go."""


class Routing(NamedTuple):
    """The experts of each token, and the weights of their answers."""

    experts_NK: Tensor
    weights_NK: Tensor
    num_experts: int

    @property
    def load_factor_E(self) -> Tensor:
        """Assignments of each expert over the average."""
        load_E = F.one_hot(self.experts_NK, self.num_experts).sum(dim=(0, 1))
        return load_E * (self.num_experts / max(self.experts_NK.numel(), 1))


class SwiGLUExperts(nn.Module):
    """Experts of one shape, stacked into one tensor per projection so that a batched matmul runs them all."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, ffn_size, hidden_size))
        for weight_EIO in self.parameters():
            bound = 1 / math.sqrt(weight_EIO.shape[1])
            nn.init.uniform_(weight_EIO, -bound, bound)

    def forward(self, x_ECD: Tensor) -> Tensor:
        """Run all experts on groups of equal length."""
        hidden_ECF = F.silu(torch.bmm(x_ECD, self.gate_proj)) * torch.bmm(x_ECD, self.up_proj)
        return torch.bmm(hidden_ECF, self.down_proj)

    def run(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Each expert on its own group, (n, D) each; empty groups cost nothing."""
        weights = zip(groups, self.gate_proj, self.up_proj, self.down_proj, strict=True)
        return [(F.silu(x_nD @ gate) * (x_nD @ up)) @ down if len(x_nD) else x_nD for x_nD, gate, up, down in weights]


class ModuleExperts(nn.ModuleDict):
    """Experts that are any modules from (n, D) to (n, D)."""

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return len(self)

    def forward(self, x_ECD: Tensor) -> Tensor:
        """Run all experts on groups of equal length."""
        return torch.stack(self.run(x_ECD.unbind(0)))

    def run(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Each expert on its own group, (n, D) each; empty groups cost nothing."""
        pairs = zip(self.values(), groups, strict=True)
        return [expert(x_nD) if len(x_nD) else x_nD for expert, x_nD in pairs]


class MoERouter(nn.Module):
    """Routes each token to its `top_k` best experts and returns their weighted sum, (..., D) to (..., D).

    `experts` is a dict of modules, or a `SwiGLUExperts`. `hidden_size` may be left out; the gate then takes its width
    from the first input. In training `capacity_factor` bounds the load; in evaluation no token is dropped. After a
    training pass `load_factor_E` holds each expert's load over the average, counted before any is dropped,
    `dropped_share` the share of assignments that found no room, and `measure_balance()` gives both in numbers. Raises
    `ConfigError` for a `top_k` or `num_candidates` that the experts do not allow, and for no capacity.

    >>> router = MoERouter({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, top_k=1)
    >>> router(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    load_factor_E: Tensor
    dropped_share: Tensor
    balance_bias_E: Tensor

    def __init__(
        self,
        experts: Mapping[str, nn.Module] | SwiGLUExperts,
        top_k: int = 2,
        *,
        hidden_size: int | None = None,
        capacity_factor: float | None = None,
        balance_rate: float = 0.0,
        num_candidates: int | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts if isinstance(experts, SwiGLUExperts) else ModuleExperts(experts)
        num_experts = self.experts.num_experts
        if not 1 <= top_k <= (num_candidates or num_experts) <= num_experts:
            raise ConfigError(
                f"top_k={top_k} of {num_candidates or num_experts} candidates and {num_experts} experts; "
                "choose 1 <= top_k <= num_candidates <= number of experts"
            )
        if capacity_factor is not None and capacity_factor <= 0:
            raise ConfigError(
                f"capacity_factor={capacity_factor} leaves no room for a token; choose one above 0, or none"
            )
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.balance_rate = balance_rate
        self.num_candidates = num_candidates
        self.gate = _linear(hidden_size, num_experts)
        self.refine = _linear(hidden_size, num_experts) if num_candidates else None
        self.register_buffer("balance_bias_E", torch.zeros(num_experts))
        self.register_buffer("load_factor_E", torch.ones(num_experts), persistent=False)
        self.register_buffer("dropped_share", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        routing = self.route(x_ND)
        if self.training:
            load_factor_E = routing.load_factor_E
            self._balance(load_factor_E, self._count_dropped(load_factor_E, len(x_ND)))
        is_bounded = self.training and self.capacity_factor is not None
        y_ND = self._run_bounded(x_ND, routing) if is_bounded else self._run_dropless(x_ND, routing)
        return y_ND.view(x.shape)

    def route(self, x_ND: Tensor) -> Routing:
        """Choose experts and weights for each token; always in at least float32, where ties are rare."""
        with torch.autocast(x_ND.device.type, enabled=False):
            wide_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
            scores_NE = self._scores(wide_ND)
        # The bias steers among experts that can answer; one that was ruled out would be chosen with a weight of zero.
        preference_NE = (scores_NE + self.balance_bias_E).masked_fill(scores_NE == 0, -torch.inf)
        experts_NK = preference_NE.topk(self.top_k, dim=-1).indices
        weights_NK = scores_NE.gather(1, experts_NK)
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        return Routing(experts_NK, weights_NK, self.experts.num_experts)

    def _scores(self, x_ND: Tensor) -> Tensor:
        """(N, E) softmax scores; zero for experts that the coarse stage ruled out."""
        coarse_NE = _project(self.gate, x_ND)
        if self.refine is None or self.num_candidates is None:
            return coarse_NE.softmax(dim=-1)
        candidates_NM = coarse_NE.topk(self.num_candidates, dim=-1).indices
        refined_NE = coarse_NE + _project(self.refine, x_ND)
        outside_NE = torch.ones_like(refined_NE, dtype=torch.bool).scatter(1, candidates_NM, False)
        return refined_NE.masked_fill(outside_NE, -torch.inf).softmax(dim=-1)

    def measure_balance(self) -> dict[str, float]:
        """Return how unevenly the last training pass used the experts, and the share of assignments it `dropped`.

        >>> router = MoERouter({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, top_k=2)
        >>> _ = router(torch.ones(3, 4))
        >>> router.measure_balance()
        {'gini': 0.0, 'largest': 1.0, 'idle': 0.0, 'dropped': 0.0}
        """
        return {**measure_load(self.load_factor_E), "dropped": float(self.dropped_share)}

    def _find_capacity(self, num_tokens: int) -> int:
        """Return how many of `num_tokens` tokens each expert takes."""
        assert self.capacity_factor is not None
        return min(num_tokens, math.ceil(self.capacity_factor * num_tokens * self.top_k / self.experts.num_experts))

    def _count_dropped(self, load_factor_E: Tensor, num_tokens: int) -> Tensor:
        """() share of assignments beyond the capacity of their expert."""
        if self.capacity_factor is None or num_tokens == 0:
            return load_factor_E.new_zeros(())
        average = num_tokens * self.top_k / self.experts.num_experts
        return (load_factor_E - self._find_capacity(num_tokens) / average).clamp(min=0).mean()

    @torch.no_grad()
    def _balance(self, load_factor_E: Tensor, dropped_share: Tensor) -> None:
        self.load_factor_E.copy_(load_factor_E)
        self.dropped_share.copy_(dropped_share)
        if self.balance_rate:
            self.balance_bias_E.sub_(self.balance_rate * (load_factor_E - 1))

    def _run_dropless(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Sort assignments by expert and let each expert answer its whole group once."""
        if len(x_ND) == 1:
            return self._run_one(x_ND, routing)
        order_A = routing.experts_NK.reshape(-1).argsort(stable=True)
        tokens_A = order_A // self.top_k
        counts = torch.bincount(routing.experts_NK.reshape(-1), minlength=self.experts.num_experts).tolist()
        answers = self.experts.run(x_ND[tokens_A].split(counts))
        # An idle expert's empty group keeps the input's dtype, and must not decide the answers'.
        answers_AD = torch.cat([answer_nD for answer_nD in answers if len(answer_nD)] or answers)
        weights_A1 = routing.weights_NK.reshape(-1)[order_A, None].to(answers_AD.dtype)
        return torch.zeros_like(x_ND, dtype=answers_AD.dtype).index_add(0, tokens_A, answers_AD * weights_A1)

    def _run_one(self, x_1D: Tensor, routing: Routing) -> Tensor:
        """A single token, as in decoding: nothing to sort. Sums in the order of the experts, as a group does."""
        weight_of = dict(zip(routing.experts_NK[0].tolist(), routing.weights_NK[0], strict=True))
        groups = [x_1D if expert in weight_of else x_1D[:0] for expert in range(routing.num_experts)]
        answers = self.experts.run(groups)
        y_1D = torch.zeros_like(answers[min(weight_of)])
        for expert in sorted(weight_of):
            y_1D = y_1D + answers[expert] * weight_of[expert].to(y_1D.dtype)
        return y_1D

    def _run_bounded(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Compute the same with a fixed number of slots per expert, so that every shape is known beforehand."""
        num_tokens, num_experts = x_ND.shape[0], self.experts.num_experts
        capacity = self._find_capacity(num_tokens)
        num_slots = num_experts * capacity
        slot_KN, has_slot_KN = _assign_slots(routing.experts_NK, num_experts, capacity)
        choices_A = torch.arange(self.top_k * num_tokens, device=x_ND.device)
        choice_1S = torch.full((1, num_slots + 1), self.top_k * num_tokens, device=x_ND.device)
        choice_1S = choice_1S.scatter(1, slot_KN.reshape(1, -1), choices_A[None])[:, :-1]
        token_S = torch.where(choice_1S[0] < len(choices_A), choice_1S[0] % num_tokens, num_tokens)
        groups_ECD = _take_rows(x_ND, token_S, slot_KN).view(num_experts, capacity, -1)
        answers_SD = self.experts(groups_ECD).view(num_slots, -1)
        answers_KND = _take_rows(answers_SD, slot_KN.reshape(-1), choice_1S).view(self.top_k, num_tokens, -1)
        weights_KN = routing.weights_NK.t() * has_slot_KN
        return (answers_KND * weights_KN[..., None].to(answers_KND.dtype)).sum(dim=0)


def measure_load(load_factor_E: Tensor) -> dict[str, float]:
    """Return how unevenly experts are used: the Gini coefficient of their loads, the largest, and the share of idle.

    >>> measure_load(torch.tensor([2.0, 2.0, 0.0, 0.0]))
    {'gini': 0.5, 'largest': 2.0, 'idle': 0.5}
    """
    load_E = load_factor_E.double().sort().values
    count = len(load_E)
    ranks_E = torch.arange(1, count + 1, dtype=torch.float64, device=load_E.device)
    gini = float((2 * ranks_E - count - 1) @ load_E / (count * load_E.sum()))
    return {"gini": round(gini, 6), "largest": float(load_E[-1]), "idle": float((load_E == 0).double().mean())}


def _assign_slots(experts_NK: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Assign each choice a slot among `num_experts * capacity` (that number for none), and say whether it has one.

    First choices of all tokens are assigned before any second choice.
    """
    experts_KN = experts_NK.t()
    one_hot_AE = F.one_hot(experts_KN.reshape(-1), num_experts)
    rank_KN = ((one_hot_AE.cumsum(dim=0) - 1) * one_hot_AE).sum(dim=-1).view_as(experts_KN)
    has_slot_KN = rank_KN < capacity
    return torch.where(has_slot_KN, experts_KN * capacity + rank_KN, num_experts * capacity), has_slot_KN


class _TakeRows(torch.autograd.Function):
    """`x[index]` whose backward is a gather too: scattering gradients row by row is what makes MoE slow on a CPU.

    An index one past the end takes a row of zeros. `readers_RM` lists, for each row of x, the up to R rows of the
    output that read it (one past the end for none), so that its gradient is the sum over those.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_MD: Tensor, index_S: Tensor, readers_RM: Tensor) -> Tensor:
        ctx.save_for_backward(readers_RM)
        return F.pad(x_MD, (0, 0, 0, 1))[index_S]

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, None, None]:
        (readers_RM,) = ctx.saved_tensors
        return F.pad(gradient_SD, (0, 0, 0, 1))[readers_RM].sum(dim=0), None, None


def _take_rows(x_MD: Tensor, index_S: Tensor, readers_RM: Tensor) -> Tensor:
    return cast("Tensor", _TakeRows.apply(x_MD, index_S, readers_RM))  # type: ignore[no-untyped-call]


def _linear(hidden_size: int | None, num_experts: int) -> nn.Linear:
    if hidden_size is None:
        return nn.LazyLinear(num_experts, bias=False)
    return nn.Linear(hidden_size, num_experts, bias=False)


def _project(linear: nn.Linear, x_ND: Tensor) -> Tensor:
    """`linear` in the dtype of its input, whatever its weights are stored in."""
    if isinstance(linear, nn.LazyLinear):
        linear(x_ND[:0].to(linear.weight.dtype))  # takes its width from the first input
    return F.linear(x_ND, linear.weight.to(x_ND.dtype))
