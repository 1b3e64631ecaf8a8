"""Micro-batches add up to the one big batch, whatever their lengths."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from deepseek.core.errors import TrainingError
from deepseek.data.batching import IGNORED_TARGET, Batch
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.optim.clipping import AdaptiveBound, FixedBound
from deepseek.optim.gradient_prediction import Damping
from deepseek.train.config import TrainConfig
from deepseek.train.steps import StepResult, summed_loss, take_step
from deepseek.train.tasks.causal_lm import CausalLM

TASK = CausalLM(TrainConfig())


def make_model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocab_size=64, num_layers=2, hidden_size=32, num_heads=2, ffn_size=64)).double()


def make_batch(lengths: list[int], width: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (len(lengths), width + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row, length in enumerate(lengths):
        targets[row, length:] = IGNORED_TARGET
    return Batch(tokens[:, :-1].contiguous(), targets, int((targets != IGNORED_TARGET).sum()))


def join(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([each.tokens_BT for each in batches]),
        torch.cat([each.targets_BT for each in batches]),
        sum(each.num_target_tokens for each in batches),
    )


def step_with_sgd(model: nn.Module, batches: list[Batch], grad_clip: float | None = None) -> StepResult:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return take_step(TASK, model, optimizer, batches, precision="fp32", bound=FixedBound(grad_clip))


def test_accumulated_micro_batches_equal_one_big_batch_with_unequal_token_counts() -> None:
    batches = [make_batch([16, 3], 16, seed=1), make_batch([1, 2], 16, seed=2), make_batch([9, 16], 16, seed=3)]
    apart, together = make_model(), make_model()
    loss_apart = step_with_sgd(apart, batches).loss
    loss_together = step_with_sgd(together, [join(batches)]).loss
    assert loss_apart == pytest.approx(loss_together, rel=1e-12)
    for one, other in zip(apart.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradient_is_that_of_the_mean_over_tokens() -> None:
    batch = make_batch([16, 5], 16, seed=4)
    model, reference = make_model(), make_model()
    step_with_sgd(model, [batch])
    logits = reference(batch.tokens_BT)
    per_token = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    (per_token.sum() / 21).backward()
    for updated, original in zip(model.parameters(), reference.parameters(), strict=True):
        assert original.grad is not None
        torch.testing.assert_close(updated, original - 0.5 * original.grad, rtol=1e-10, atol=1e-12)


def test_clipping_bounds_the_norm_of_the_whole_step_not_of_each_micro_batch() -> None:
    batches = [make_batch([16, 16], 16, seed=1), make_batch([4, 4], 16, seed=2)]
    model, reference = make_model(), make_model()
    step_with_sgd(model, batches, grad_clip=0.01)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), reference.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-6)


def test_a_step_whose_loss_is_not_a_number_is_not_taken() -> None:
    model = make_model()
    with torch.no_grad():
        model.norm.weight[0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    result = step_with_sgd(model, [make_batch([16], 16, seed=1)])
    assert not result.is_taken
    assert math.isnan(result.loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_step_without_a_single_target_is_refused() -> None:
    with pytest.raises(TrainingError, match="no tokens to learn from"):
        step_with_sgd(make_model(), [make_batch([0], 16, seed=1)])


def test_bf16_loss_is_close_to_the_float64_loss() -> None:
    batch = make_batch([16, 16], 16, seed=1)
    exact = summed_loss(TASK, make_model(), batch, precision="fp32").item()
    rounded = summed_loss(TASK, make_model().float(), batch, precision="bf16").item()
    assert rounded == pytest.approx(exact, rel=0.01)


class Foresight:
    """A prediction that is always the same, and remembers what it was shown."""

    def observe(self, loss: float, norm: float) -> Damping:
        self.seen = loss, norm
        return Damping(0.25, "a test")


def test_a_damped_step_is_the_step_at_the_damped_rate_of_the_gradient_as_it_was_bounded() -> None:
    batch = make_batch([16, 5], 16, seed=4)
    damped, reference = make_model(), make_model()
    foresight = Foresight()
    optimizer = torch.optim.SGD(damped.parameters(), lr=0.5)
    result = take_step(TASK, damped, optimizer, [batch], precision="fp32", bound=FixedBound(0.01), prediction=foresight)
    plain = torch.optim.SGD(reference.parameters(), lr=0.125)
    summed_loss(TASK, reference, batch, precision="fp32").div(21).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    plain.step()
    assert foresight.seen == (result.loss, result.grad_norm) and result.grad_norm == pytest.approx(norm.item())
    assert result.damping == Damping(0.25, "a test")
    for one, other in zip(damped.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)  # torch divides by the norm plus 1e-6


def test_an_adaptive_bound_makes_steps_no_longer_than_the_last_ones() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = AdaptiveBound(50, window=3)
    norms, lengths = [], []
    for seed in range(6):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        batch = make_batch([16, 5], 16, seed=seed)
        norms.append(take_step(TASK, model, optimizer, [batch], precision="fp32", bound=bound).grad_norm)
        moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)])
        lengths.append(moved.norm().item() / 0.1)
    expected = [min(norm, sorted(norms[max(0, end - 2) : end + 1])[min(end, 2) // 2]) for end, norm in enumerate(norms)]
    assert lengths == pytest.approx(expected, rel=1e-6) and lengths != pytest.approx(norms, rel=1e-3)
