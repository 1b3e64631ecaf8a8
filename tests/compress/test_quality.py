"""Losses and speeds of two models side by side."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek.compress.quality import compare, measure_decoding, measure_losses
from deepseek.core.errors import DataError
from deepseek.data.batching import IGNORED_TARGET, Batch
from deepseek.models.decoder.model import Decoder


@torch.no_grad()
def plain_loss(model: Decoder, batches: list[Batch]) -> float:
    """The mean over all targets that count, one by one, in float64."""
    exact = copy.deepcopy(model).double()
    losses = []
    for batch in batches:
        log_probabilities = exact(batch.tokens_BT).log_softmax(dim=-1)
        for row, column in (batch.targets_BT != IGNORED_TARGET).nonzero().tolist():
            losses.append(-log_probabilities[row, column, batch.targets_BT[row, column]].item())
    return sum(losses) / len(losses)


def scaled(model: Decoder, factor: float) -> Decoder:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.weight.mul_(factor)
    return other


def test_losses_are_means_over_all_tokens(model: Decoder, batches: list[Batch]) -> None:
    other = scaled(model, 0.5)
    losses, num_tokens = measure_losses([model, other], iter(batches))
    assert num_tokens == 4 * 20 + 2 * 3 + 1
    assert losses == pytest.approx([plain_loss(model, batches), plain_loss(other, batches)], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_a_comparison_is_made_of_its_parts(model: Decoder, batches: list[Batch]) -> None:
    other = scaled(model, 0.5)
    comparison = compare(model, other, batches, bytes_before=400, bytes_after=100)
    assert comparison.bytes_ratio == 0.25
    assert comparison.loss_before == pytest.approx(plain_loss(model, batches), rel=1e-5)
    assert comparison.loss_increase == pytest.approx(comparison.loss_after / comparison.loss_before - 1)
    speeds = comparison.decode_tokens_per_s_before, comparison.decode_tokens_per_s_after
    assert comparison.decode_speedup == pytest.approx(speeds[1] / speeds[0])
    assert min(speeds) > 0


def test_nothing_to_predict_is_refused(model: Decoder, batches: list[Batch]) -> None:
    nothing = Batch(batches[0].tokens_BT, torch.full_like(batches[0].targets_BT, IGNORED_TARGET), 0)
    for empty in ([], [nothing]):
        with pytest.raises(DataError, match="no token to predict"):
            measure_losses([model], empty)


def test_decoding_stays_within_the_context(model: Decoder) -> None:
    """The model was made for 32 tokens, which is fewer than is usually decoded."""
    rates = measure_decoding([model, model], num_rounds=1)
    assert len(rates) == 2
    assert min(rates) > 0


class Counting(Decoder):
    """Remembers in which order its instances were run."""

    order: list[int] = []  # noqa: RUF012 - shared on purpose

    def forward(self, *args: object, **keywords: object) -> torch.Tensor:
        self.order.append(id(self))
        return super().forward(*args, **keywords)  # type: ignore[arg-type]


def test_models_take_turns(model: Decoder) -> None:
    one, other = Counting(model.config).eval(), Counting(model.config).eval()
    Counting.order.clear()
    measure_decoding([one, other], num_tokens=2, num_rounds=2)
    assert Counting.order == [id(each) for each in (one, one, other, other)] * 3
