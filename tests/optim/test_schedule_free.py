"""The average that is shown against the formula, and the iterate that comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek.optim.optimizers import OptimizerConfig, build_optimizer
from deepseek.optim.schedule_free import averaged

pytest.importorskip("schedulefree")
BETAS, EPS, RATE = (0.9, 0.95), 1e-8, 0.05


def gradient(weight: torch.Tensor, step: int) -> torch.Tensor:
    return torch.sin(weight * (step + 1)) + weight


def test_it_is_the_papers_recursion() -> None:
    """x, y and z of Defazio et al. 2024, algorithm 1 with constant rate, in float64."""
    model = nn.Linear(4, 3, bias=False).double()
    x = z = model.weight.detach().clone()
    square = torch.zeros_like(x)
    config = OptimizerConfig(name="schedule_free", betas=BETAS, eps=EPS, weight_decay=0.1)
    optimizer = build_optimizer(model, config, RATE)
    for step in range(12):
        y = (1 - BETAS[0]) * z + BETAS[0] * x
        torch.testing.assert_close(model.weight.detach(), y)
        own = gradient(y, step)
        square = BETAS[1] * square + (1 - BETAS[1]) * own.square()
        denominator = (square / (1 - BETAS[1] ** (step + 1))).sqrt() + EPS
        z = z - RATE * (own / denominator + 0.1 * y)
        x = (1 - 1 / (step + 1)) * x + z / (step + 1)
        model.weight.grad = gradient(model.weight.detach(), step)
        optimizer.step()
        iterate = model.weight.detach().clone()
        with averaged(optimizer):
            torch.testing.assert_close(model.weight.detach(), x)
        assert torch.equal(model.weight, iterate)


def test_an_error_inside_brings_the_iterate_back() -> None:
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(model, OptimizerConfig(name="schedule_free"), RATE)
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.ones(3, 4), torch.ones(3)
        optimizer.step()
    before = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), averaged(optimizer):
        assert not torch.equal(model.weight, before)
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)
    optimizer.step()  # it is learning again


def test_other_optimizers_are_shown_as_they_are() -> None:
    model = nn.Linear(2, 2)
    with averaged(torch.optim.SGD(model.parameters(), lr=0.1)):
        pass


def test_the_schedule_is_its_warm_up_alone() -> None:
    assert OptimizerConfig(name="schedule_free", schedule="cosine").used_schedule == "constant"
    assert OptimizerConfig(name="adamw", schedule="cosine").used_schedule == "cosine"
