"""What is foreseen, what is not, and that a rate which blows a run up no longer does."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.optim.gradient_prediction import GradientPrediction, GradientPredictionConfig
from deepseek.optim.optimizers import OptimizerConfig, build_optimizer, scale_learning_rate_, set_learning_rate

NOISE = 0.03


def new(**settings: float) -> GradientPrediction:
    return GradientPrediction(GradientPredictionConfig(**settings))


def calm_run(seed: int, num_steps: int = 300) -> list[tuple[float, float]]:
    """Losses that fall from 5 to 2 with noise, and norms that fall with them."""
    generator = random.Random(seed)
    losses = [2 + 3 * math.exp(-step / 40) + generator.gauss(0, NOISE) for step in range(num_steps)]
    return [(loss, loss * math.exp(generator.gauss(0, 0.2))) for loss in losses]


def factors(prediction: GradientPrediction, run: list[tuple[float, float]]) -> list[float]:
    return [prediction.observe(loss, norm).factor for loss, norm in run]


@pytest.mark.parametrize("seed", range(10))
def test_a_calm_run_is_left_alone(seed: int) -> None:
    assert set(factors(new(), calm_run(seed))) == {1.0}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), growth=st.floats(1.1, 3.0), begin=st.integers(20, 100))
def test_a_loss_that_goes_up_step_after_step_is_damped_soon_and_ever_more(seed: int, growth: float, begin: int) -> None:
    run = calm_run(seed, begin)
    usual, norm = run[-1]
    rising = [(usual * growth**step, norm) for step in range(1, 9)]
    prediction = new()
    before = factors(prediction, run)[-1]
    during = factors(prediction, rising)
    assert before == 1.0 and during[4] <= 0.5 and during[-1] <= 0.25
    assert rising[next(step for step, factor in enumerate(during) if factor < 1)][0] < 2 * usual * growth**2


def test_one_odd_batch_is_damped_by_itself_and_two_are_a_trend() -> None:
    run = calm_run(0, 60)
    loss, norm = run[-1]
    prediction = new()
    factors(prediction, run)
    odd = prediction.observe(loss + 0.2, 100 * norm)
    assert 0 < odd.factor < 0.05 and odd.reason.startswith("the gradient norm is")
    assert prediction.observe(loss, norm).factor == 1.0
    second = prediction.observe(loss + 0.2, 100 * norm)
    assert second.factor < odd.factor
    assert prediction.observe(loss, norm).factor < 1.0


def test_the_rate_comes_back_when_it_is_over() -> None:
    prediction = new()
    run = calm_run(1, 100)
    factors(prediction, run)
    factors(prediction, [(run[-1][0] * 1.3**step, run[-1][1]) for step in range(1, 6)])
    lowest = prediction.factor
    after = factors(prediction, [(2.1 + 0.01 * (step % 3), 2.0) for step in range(600)])
    assert lowest < 1 and after == sorted(after) and after[-1] == 1.0


def test_the_factor_has_a_floor() -> None:
    prediction = new(smallest_factor=0.2)
    factors(prediction, calm_run(0, 40))
    factors(prediction, [(2 * 1.5**step, 1.5**step) for step in range(20)])
    assert prediction.factor == 0.2


@pytest.mark.parametrize("cut", [0, 1, 5, 47, 55])
def test_it_goes_on_from_its_state_bit_by_bit(cut: int) -> None:
    run = calm_run(3, 45) + [(2 * 1.2**step, 1.4**step) for step in range(12)] + calm_run(4, 40)
    whole, begun, resumed = new(), new(), new()
    expected = factors(whole, run)
    first = factors(begun, run[:cut])
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert first + factors(resumed, run[cut:]) == expected


def test_a_quadratic_beyond_two_over_l_comes_down_instead_of_up() -> None:
    """SGD with momentum on a quadratic, whose largest stable rate is known: 2 (1 + momentum) / L."""
    curvatures = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)

    def descend(learning_rate: float, prediction: GradientPrediction | None) -> float:
        model = torch.nn.Linear(3, 1, bias=False).double()
        torch.nn.init.ones_(model.weight)
        config = OptimizerConfig(name="sgd", momentum=0.9, weight_decay=0.0)
        optimizer = build_optimizer(model, config, learning_rate)
        for _ in range(200):
            set_learning_rate(optimizer, learning_rate)
            optimizer.zero_grad()
            loss = (curvatures * model.weight.square()).sum() / 2
            loss.backward()
            if prediction is not None:
                norm = float(torch.nn.utils.get_total_norm([model.weight.grad]))
                scale_learning_rate_(optimizer, prediction.observe(loss.item(), norm).factor)
            optimizer.step()
        return float((curvatures * model.weight.detach().square()).sum() / 2)

    limit = 2 * 1.9 / 100
    assert descend(0.5 * limit, None) < 1e-3
    for excess in (1.2, 3.0, 10.0):
        assert not descend(excess * limit, None) < 1e6
        assert descend(excess * limit, new()) < 1.0 < 55.5  # where it began


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_settings_that_make_no_sense_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="sensitivity"):
        OptimizerConfig(gradient_prediction={"sensitivity": value})
    assert OptimizerConfig(gradient_prediction=True).gradient_prediction == GradientPredictionConfig()
    assert OptimizerConfig(gradient_prediction=False).gradient_prediction is None
