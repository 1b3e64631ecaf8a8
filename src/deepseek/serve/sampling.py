"""Choosing the next token from logits: greedy, or sampled under a temperature, the top k and the top p.

A sample inverts the cumulative distribution at one uniform number, which the caller takes from the random generator of
the request. So a choice depends on its own logits, settings and seed, and never on who else is in the batch. Sampled
rows are handled one by one on the CPU in float64: the same sample on every device. Cost: one sort of V numbers for a
row with top p (about 2 ms at V = 50,000), nothing of the kind for a greedy one.

Shapes: B sequences, V vocabulary. Source of top p: Holtzman et al. 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.serve.sequences import Logprobs, Sampling

LEAST_LOGPROB = -9999.0
"""The value OpenAI reports for a probability of zero, since JSON has no infinity."""


def choose(logits_BV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int | None]:
    """Choose one token per row; `uniforms` in [0, 1) are used by the rows that are sampled.

    None for a row whose best logit is not a finite number, which no choice can be made from.

    >>> choose(torch.tensor([[0.0, 3.0, 1.0]]), [Sampling(temperature=0)], [0.5])
    [1]
    """
    best_B, tokens_B = logits_BV.max(dim=-1)
    is_finite: list[bool] = best_B.isfinite().tolist()
    tokens: list[int | None] = tokens_B.tolist()
    for row, (sampling, uniform) in enumerate(zip(samplings, uniforms, strict=True)):
        if not is_finite[row]:
            tokens[row] = None
        elif not sampling.is_greedy:
            tokens[row] = sample(logits_BV[row], sampling, uniform)
    return tokens


def sample(logits_V: Tensor, sampling: Sampling, uniform: float) -> int:
    """Return the token at `uniform`, in [0, 1), of the cumulative distribution that `sampling` makes of `logits_V`."""
    probabilities_K, tokens_K = distribution(logits_V, sampling)
    cumulative_K = probabilities_K.cumsum(0)
    rank = torch.searchsorted(cumulative_K, uniform * cumulative_K[-1], right=True)  # below K, since uniform is below 1
    return int(tokens_K[rank])


def distribution(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the tokens (K,) that may be sampled with their float64 probabilities (K,), likeliest first if any are cut.

    Temperature comes first, then top k, then top p on what top k left.
    """
    logits_V = logits_V.detach().cpu()
    tokens_K = torch.arange(len(logits_V))
    if 0 < sampling.top_k < len(logits_V) or sampling.top_p < 1:
        tokens_K = logits_V.sort(descending=True, stable=True).indices[: sampling.top_k or None]
    probabilities_K = torch.softmax(_scale_by_temperature(logits_V[tokens_K].double(), sampling.temperature), dim=0)
    if sampling.top_p < 1:
        reached_K = probabilities_K.cumsum(0) - probabilities_K  # by the tokens before
        num_kept = max(1, int((reached_K < sampling.top_p).sum()))
        probabilities_K, tokens_K = probabilities_K[:num_kept], tokens_K[:num_kept]
    return probabilities_K / probabilities_K.sum(), tokens_K


def score(logits_V: Tensor, token: int, num_top: int) -> Logprobs:
    """Return the log-probability of `token` under `logits_V`, and the `num_top` likeliest tokens with theirs."""
    logprobs_V = torch.log_softmax(logits_V.detach().float(), dim=-1)
    top = torch.topk(logprobs_V, min(num_top, len(logprobs_V)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Logprobs(max(float(logprobs_V[token]), LEAST_LOGPROB), tuple((t, max(p, LEAST_LOGPROB)) for t, p in pairs))


def _scale_by_temperature(logits_K: Tensor, temperature: float) -> Tensor:
    """Divide logits by the temperature; the largest is subtracted first, so that a tiny temperature cannot overflow."""
    return (logits_K - logits_K.max()) / temperature
