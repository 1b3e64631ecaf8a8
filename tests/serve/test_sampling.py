"""Sampling against formulas, and against the filters of `transformers`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from deepseek.serve.sampling import choose, distribution, sample, score
from deepseek.serve.sequences import Sampling

uniforms = st.floats(0, 1, exclude_max=True)
logits = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40, unique=True).map(torch.tensor)


def dense(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    probabilities_K, tokens_K = distribution(logits_V, sampling)
    return torch.zeros(len(logits_V), dtype=torch.float64).index_put_((tokens_K,), probabilities_K)


@settings(deadline=None)
@given(
    logits_V=logits,
    temperature=st.floats(0.1, 2),
    top_k=st.integers(1, 50),
    top_p=st.floats(0.05, 0.95),
)
def test_filters_agree_with_transformers(logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float) -> None:
    scores_1V = logits_V.double()[None]
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        scores_1V = warper(torch.zeros(1, 1, dtype=torch.long), scores_1V)
    expected_V = torch.softmax(scores_1V[0], dim=0)
    found_V = dense(logits_V, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    reached = torch.softmax(logits_V.double() / temperature, 0).sort(descending=True).values.cumsum(0)
    if (reached - top_p).abs().min() > 1e-9:  # at the boundary itself rounding decides
        torch.testing.assert_close(found_V, expected_V, atol=1e-9, rtol=1e-9)


def test_without_filters_the_distribution_is_the_softmax_over_temperature() -> None:
    logits_V = torch.tensor([0.5, -1.0, 2.0, 0.0])
    expected = [math.exp(each / 0.7) for each in logits_V.tolist()]
    found = dense(logits_V, Sampling(temperature=0.7)).tolist()
    assert found == pytest.approx([each / sum(expected) for each in expected])


@given(logits_V=logits, uniform=uniforms, temperature=st.floats(0.01, 2), top_p=st.floats(0, 1))
def test_a_draw_is_where_the_cumulative_distribution_passes_the_uniform(
    logits_V: torch.Tensor, uniform: float, temperature: float, top_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p)
    probabilities_K, tokens_K = distribution(logits_V, sampling)
    token = sample(logits_V, sampling, uniform)
    rank = tokens_K.tolist().index(token)
    below = float(probabilities_K[:rank].sum())
    assert below - 1e-9 <= uniform <= below + float(probabilities_K[rank]) + 1e-9


def test_draws_over_an_even_grid_have_the_frequencies_of_the_distribution() -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0, 3.0])
    sampling = Sampling(temperature=1.3)
    size = 2000
    tokens = [sample(logits_V, sampling, (step + 0.5) / size) for step in range(size)]
    expected_V = torch.softmax(logits_V.double() / 1.3, 0)
    for token in range(4):
        assert tokens.count(token) / size == pytest.approx(float(expected_V[token]), abs=1 / size)


def test_temperature_zero_takes_the_largest_logit_of_each_row() -> None:
    logits_BV = torch.tensor([[0.0, 5.0, 1.0], [9.0, 5.0, 1.0]])
    assert choose(logits_BV, [Sampling(temperature=0)] * 2, [0.9, 0.9]) == [1, 0]


def test_a_row_is_drawn_alike_in_any_company() -> None:
    torch.manual_seed(0)
    logits_BV = torch.randn(5, 50)
    samplings = [
        Sampling(temperature=t, top_k=k, top_p=p)
        for t, k, p in [(1, 0, 1.0), (0, 0, 1.0), (0.5, 7, 1.0), (1, 0, 0.8), (2, 9, 0.5)]
    ]
    draws = [0.1, 0.3, 0.5, 0.7, 0.9]
    together = choose(logits_BV, samplings, draws)
    alone = [choose(logits_BV[i : i + 1], [samplings[i]], [draws[i]])[0] for i in range(5)]
    assert together == alone


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_the_likeliest_token_always_stays(top_p: float) -> None:
    assert sample(torch.tensor([1.0, 1.5, 0.0]), Sampling(top_p=top_p), 0.999) == 1


def test_a_token_without_probability_is_never_drawn() -> None:
    assert sample(torch.tensor([-1e5, 0.0, -1e5]), Sampling(), 0.0) == 1
    assert sample(torch.tensor([-1e5, 0.0, -1e5]), Sampling(), 1 - 2**-53) == 1


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert sample(torch.tensor([100.0, 101.0, 0.0]), Sampling(temperature=1e-300), 0.5) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_logits_that_are_not_numbers_has_no_choice_and_the_others_have_theirs(bad: float) -> None:
    logits_BV = torch.tensor([[0.0, 9.0], [0.0, bad], [9.0, 0.0]])
    assert choose(logits_BV, [Sampling(), Sampling(), Sampling(temperature=0)], [0.5] * 3) == [1, None, 0]


def test_log_probabilities_are_those_of_the_formula() -> None:
    logits = [0.5, -1.0, 2.0, 0.0]
    total = math.log(sum(math.exp(each) for each in logits))
    found = score(torch.tensor(logits), token=0, num_top=2)
    assert found.chosen == pytest.approx(0.5 - total, abs=1e-6)
    assert [token for token, _ in found.top] == [2, 0]
    assert [value for _, value in found.top] == pytest.approx([2.0 - total, 0.5 - total], abs=1e-6)
