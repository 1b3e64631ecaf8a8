"""A window is the sum of what its samples say, and says nothing of a sample that broke."""

import math

import pytest
import torch
from torch import nn

from deepseek.mixed_precision.costs import Saving
from deepseek.mixed_precision.gradient_statistics import Watch
from deepseek.mixed_precision.sample_window import SampleWindow, estimate_signal

NAMES = ("0", "2")
SAVINGS = {name: Saving(1.0, 2.0) for name in NAMES}


def take_sample(x, scale=1.0):
    """One forward and backward pass, watched: what `DynamicPrecision` hands over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    watch = Watch({name: model[int(name)] for name in NAMES})
    (model(x).sum() * scale).backward()
    watch.close()
    return watch.samples, {name: model[int(name)].weight.grad.double().flatten() for name in NAMES}


def new_window():
    return SampleWindow(NAMES, torch.device("cpu"), None)


def test_evidence_is_worked_out_from_all_gradients_of_the_window():
    window, gradients = new_window(), []
    for seed in range(4):
        sample = take_sample(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)))
        assert window.add(*sample) is None
        gradients.append(sample[1])
        assert window.num_samples == seed + 1
    evidence = window.gather(SAVINGS, scale=1.0)
    for name in NAMES:
        stack = torch.stack([gradient[name] for gradient in gradients])
        expected = estimate_signal(float(stack.sum(0).square().sum()), float(stack.square().sum()), 4)
        assert evidence[name].num_samples == 4
        assert 0 < expected < math.inf
        assert evidence[name].signal == pytest.approx(expected)
        assert (evidence[name].saved_s, evidence[name].saved_bytes) == (1.0, 2.0)


def test_a_sample_with_infinities_is_not_added_and_says_where_they_are():
    window = new_window()
    assert window.add(*take_sample(torch.ones(4, 8))) is None
    before = window.state_dict()
    flags = window.add(*take_sample(torch.full((4, 8), math.inf)))
    assert flags[0, :2].tolist() == [1.0, 1.0]  # its inputs were infinite already
    assert window.num_samples == 1
    assert torch.equal(window.state_dict()["counts"], before["counts"])


def test_a_window_goes_on_from_its_state():
    whole, stopped = new_window(), new_window()
    samples = [take_sample(torch.full((4, 8), float(number))) for number in (1, 2, 3)]
    for sample in samples:
        whole.add(*sample)
    stopped.add(*samples[0])
    resumed = new_window()
    resumed.load_state_dict(stopped.state_dict())
    for sample in samples[1:]:
        resumed.add(*sample)
    assert resumed.gather(SAVINGS, 1.0) == whole.gather(SAVINGS, 1.0)
    assert stopped.num_samples == 1  # the state was a copy
    whole.clear()
    assert whole.num_samples == 0


def test_gradients_are_counted_without_the_scale_they_were_multiplied_with():
    plain, scaled = new_window(), new_window()
    plain.add(*take_sample(torch.ones(4, 8)))
    scaled.add(*take_sample(torch.ones(4, 8), scale=1024.0))
    for name in NAMES:
        one, other = (
            window.gather(SAVINGS, scale)[name].gradients for window, scale in ((plain, 1.0), (scaled, 1024.0))
        )
        assert one.largest_exponent == other.largest_exponent > -math.inf
        assert one.num_zeros == other.num_zeros
    unscaled = scaled.gather(SAVINGS, 1.0)["2"].gradients
    assert unscaled.largest_exponent == plain.gather(SAVINGS, 1.0)["2"].gradients.largest_exponent + 10


@pytest.mark.parametrize("num_samples", [2, 5, 50])
def test_the_signal_is_estimated_without_bias(num_samples):
    """Against its definition, on gradients of known mean and variance, over many windows."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation, size = 0.3, 1.0, 64
    estimates = []
    for _ in range(2000):
        samples = mean + deviation * torch.randn(num_samples, size, generator=generator, dtype=torch.float64)
        squared_sum, sum_of_squares = samples.sum(0).square().sum().item(), samples.square().sum().item()
        mean_squared = (squared_sum - sum_of_squares) / (num_samples * (num_samples - 1))
        estimates.append(mean_squared)
        signal = estimate_signal(squared_sum, sum_of_squares, num_samples)
        variance = sum_of_squares / num_samples - max(0.0, mean_squared)
        assert signal == pytest.approx(max(0.0, mean_squared) / variance)
    assert sum(estimates) / len(estimates) == pytest.approx(size * mean**2, rel=0.05)
