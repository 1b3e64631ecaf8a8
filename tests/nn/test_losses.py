"""The loss of the head's inputs is torch's cross-entropy of the logits, in its value and in its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.nn import losses
from deepseek.nn.losses import sum_cross_entropy, sum_linear_cross_entropy

NOTHING = -100


def make_inputs(dtype: torch.dtype = torch.float64, *, num_rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 7, 5, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(11, 5, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, 11, (num_rows, 7), generator=generator)
    targets[1, 2:] = NOTHING
    return hidden, weight, targets


def take_reference(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOTHING, reduction="sum")


@pytest.fixture(params=[1, 4, 256], ids=lambda rows: f"chunks of {rows}")
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(losses, "_LEAST_CHUNK_ROWS", request.param)
    return int(request.param)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.usefixtures("chunk_rows")
def test_loss_and_gradients_are_those_of_the_logits(softcap: float | None) -> None:
    hidden, weight, targets = make_inputs()
    loss = sum_linear_cross_entropy(hidden, weight, targets, ignored_target=NOTHING, softcap=softcap)
    expected = take_reference(hidden, weight, targets, softcap)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss / 3, (hidden, weight)),
        torch.autograd.grad(expected / 3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("chunk_rows")
def test_the_gradient_is_the_slope_of_the_loss() -> None:
    hidden, weight, targets = make_inputs()
    directions = [torch.randn_like(tensor) for tensor in (hidden, weight)]

    def loss_at(distance: float) -> Tensor:
        moved = [tensor + distance * direction for tensor, direction in zip((hidden, weight), directions, strict=True)]
        return sum_linear_cross_entropy(moved[0], moved[1], targets, ignored_target=NOTHING, softcap=2.0)

    gradients = torch.autograd.grad(loss_at(0.0), (hidden, weight))
    slope = sum((a * b).sum() for a, b in zip(gradients, directions, strict=True))
    numerical = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert slope == pytest.approx(numerical.item(), rel=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    hidden, weight, targets = make_inputs()
    expected = torch.autograd.grad(take_reference(hidden, weight, targets), (hidden, weight))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    sum_linear_cross_entropy(hidden, weight, targets, ignored_target=NOTHING).backward()
    for tensor, gradient in zip((hidden, weight), expected, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_without_gradients_there_is_the_loss_alone() -> None:
    hidden, weight, targets = make_inputs()
    with torch.no_grad():
        loss = sum_linear_cross_entropy(hidden, weight, targets, ignored_target=NOTHING)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, take_reference(hidden, weight, targets).detach())


def test_rows_without_a_target_have_neither_loss_nor_gradient() -> None:
    hidden, weight, targets = make_inputs()
    loss = sum_linear_cross_entropy(hidden, weight, torch.full_like(targets, NOTHING), ignored_target=NOTHING)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_far_logits_are_no_infinity() -> None:
    hidden, weight = torch.tensor([[[1.0]]], requires_grad=True), torch.tensor([[1000.0], [-1000.0]])
    loss = sum_linear_cross_entropy(hidden, weight, torch.tensor([[1]]), ignored_target=NOTHING)
    loss.backward()
    assert loss.item() == 2000
    assert hidden.grad is not None and hidden.grad.item() == 2000


def test_under_autocast_values_are_those_of_the_logits_under_autocast() -> None:
    hidden, weight, targets = make_inputs(torch.float32)
    results = []
    for is_ours in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if is_ours:
                loss = sum_linear_cross_entropy(hidden, weight, targets, ignored_target=NOTHING)
            else:
                loss = sum_cross_entropy(F.linear(hidden, weight), targets, ignored_target=NOTHING)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-2)


def test_a_second_backward_pass_is_refused_and_never_scaled_twice() -> None:
    loss = sum_linear_cross_entropy(*make_inputs(), ignored_target=NOTHING)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
