import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek.core.errors import ConfigError, TrainingError
from deepseek.optim.clipping import AdaptiveBound, FixedBound, build_bound, clip_gradients_


def make_parameters(sizes, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return parameters


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    scale=st.floats(1e-3, 1e3),
    max_norm=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_it_is_torchs_clipping(sizes, scale, max_norm, seed):
    ours, theirs = (make_parameters(sizes, scale, seed) for _ in range(2))
    exact_norm = math.sqrt(sum(each.grad.double().square().sum().item() for each in ours))
    norm = clip_gradients_(ours, max_norm)
    their_norm = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(their_norm.item(), rel=1e-6) == pytest.approx(exact_norm, rel=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        # torch divides by the norm plus 1e-6.
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5 + 1e-6 / norm, atol=0)
    clipped = math.sqrt(sum(each.grad.double().square().sum().item() for each in ours))
    assert clipped == pytest.approx(min(exact_norm, max_norm), rel=1e-5)


def test_a_gradient_within_the_bound_keeps_every_bit():
    parameters = make_parameters([3, 4])
    before = [each.grad.clone() for each in parameters]
    clip_gradients_(parameters, 1e6)
    assert all(torch.equal(each.grad, other) for each, other in zip(parameters, before, strict=True))


def test_without_a_bound_it_only_measures():
    parameters = make_parameters([3, 4], scale=1e6)
    before = [each.grad.clone() for each in parameters]
    assert clip_gradients_(iter(parameters), None) == pytest.approx(torch.cat(before).norm().item())
    assert all(torch.equal(each.grad, other) for each, other in zip(parameters, before, strict=True))


def test_parameters_without_a_gradient_do_not_count():
    parameters = [*make_parameters([3]), nn.Parameter(torch.ones(5))]
    assert clip_gradients_(parameters, 1.0) == pytest.approx(make_parameters([3])[0].grad.norm().item())
    assert parameters[1].grad is None
    assert clip_gradients_([nn.Parameter(torch.ones(5))], 1.0) == 0.0


def test_zero_gradients_stay_zero():
    parameters = make_parameters([3], scale=0.0)
    assert clip_gradients_(parameters, 1.0) == 0.0
    assert parameters[0].grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_a_gradient_that_is_no_number_stops_the_run_and_is_left_to_be_looked_at(value, max_norm):
    parameters = make_parameters([3, 4])
    parameters[1].grad[2] = value
    before = [each.grad.clone() for each in parameters]
    with pytest.raises(TrainingError, match=r"the gradient norm is (nan|inf); expected a finite number: lower the"):
        clip_gradients_(parameters, max_norm)
    for each, other in zip(parameters, before, strict=True):
        torch.testing.assert_close(each.grad, other, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None)
@given(
    norms=st.lists(st.floats(0, 1e3), min_size=1, max_size=40),
    percentile=st.floats(1, 100),
    window=st.integers(1, 12),
    max_norm=st.none() | st.floats(0.1, 10),
)
def test_an_adaptive_bound_is_numpys_percentile_of_the_last_norms(norms, percentile, window, max_norm):
    bound = build_bound(max_norm, percentile, window)
    for number, norm in enumerate(norms, start=1):
        last = norms[max(0, number - window) : number]
        limit = float(np.percentile(last, percentile, method="inverted_cdf"))
        limit = min(limit or math.inf, math.inf if max_norm is None else max_norm)
        assert norm * bound.factor(1.0, norm) == pytest.approx(min(norm, limit), rel=1e-9)


def test_an_adaptive_bound_goes_on_from_its_state():
    whole, begun = AdaptiveBound(80, window=5), AdaptiveBound(80, window=5)
    norms = [1.0, 4.0, 2.0, 8.0, 1.0, 0.5, 3.0, 9.0]
    expected = [whole.factor(1.0, norm) for norm in norms]
    first = [begun.factor(1.0, norm) for norm in norms[:4]]
    resumed = AdaptiveBound(80, window=5)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert first + [resumed.factor(1.0, norm) for norm in norms[4:]] == expected
    resumed.load_state_dict(FixedBound(1.0).state_dict())
    assert resumed.factor(1.0, 100.0) == 1.0


def test_without_a_percentile_the_bound_is_fixed():
    assert build_bound(2.0, None).factor(1.0, 8.0) == 0.25
    assert build_bound(None, None).factor(1.0, 8.0) == 1.0


@pytest.mark.parametrize(
    ("percentile", "window", "reason"),
    [(0, 5, "percentile is 0"), (101, 5, "percentile is 101"), (50, 0, "window is 0")],
)
def test_an_adaptive_bound_refuses_what_is_no_percentile_or_window(percentile, window, reason):
    with pytest.raises(ConfigError, match=reason):
        AdaptiveBound(percentile, window=window)
