"""What a smaller model costs and brings: bytes, held-out loss and decode speed beside those of the original.

Both sides are measured in turns within one call, so that a noisy machine disturbs both alike. Speeds are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from deepseek.core.config import Config
from deepseek.core.errors import DataError
from deepseek.data.batching import IGNORED_TARGET, Batch
from deepseek.models.decoder.model import Decoder
from deepseek.nn.losses import sum_cross_entropy


class Comparison(Config):
    """A compressed model beside its original."""

    model_config = ConfigDict(allow_inf_nan=True)  # a broken model's loss is reported as it is

    bytes_before: int
    """Bytes of the original's weights, in FP32 and before any file's header."""
    bytes_after: int
    """Bytes of the compressed model's weights."""
    bytes_ratio: float
    """Bytes after over bytes before."""
    loss_before: float
    """Held-out loss of the original, in nats per token."""
    loss_after: float
    """Held-out loss of the compressed model, in nats per token."""
    loss_increase: float
    """Relative change of the held-out loss; 0.01 is one percent worse."""
    num_tokens: int = Field(ge=1)
    """Held-out tokens that both losses are means over."""
    decode_tokens_per_s_before: float
    """Greedy decoding of one sequence by the original."""
    decode_tokens_per_s_after: float
    """Greedy decoding of one sequence by the compressed model."""
    decode_speedup: float
    """Decoding speed after over before."""


def compare(
    before: Decoder, after: Decoder, batches: Iterable[Batch], *, bytes_before: int, bytes_after: int
) -> Comparison:
    """Measure both models on the same held-out `batches` and on decoding."""
    losses, num_tokens = measure_losses([before, after], batches)
    speeds = measure_decoding([before, after])
    return Comparison(
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        bytes_ratio=bytes_after / bytes_before,
        loss_before=losses[0],
        loss_after=losses[1],
        loss_increase=losses[1] / losses[0] - 1,
        num_tokens=num_tokens,
        decode_tokens_per_s_before=speeds[0],
        decode_tokens_per_s_after=speeds[1],
        decode_speedup=speeds[1] / speeds[0],
    )


@torch.inference_mode()
def measure_losses(models: Sequence[Decoder], batches: Iterable[Batch]) -> tuple[list[float], int]:
    """Measure the mean cross-entropy of each model over the same batches, in nats per token, and the number of tokens.

    Raises `DataError` where there is no token to predict.
    """
    sums, num_tokens = [0.0] * len(models), 0
    for batch in batches:
        num_tokens += batch.num_target_tokens
        for index, model in enumerate(models):
            sums[index] += _summed_loss(model, batch).item()
    if num_tokens == 0:
        raise DataError("the held-out text has no token to predict, so nothing can be compared; give more of it")
    return [loss_sum / num_tokens for loss_sum in sums], num_tokens


def _summed_loss(model: Decoder, batch: Batch) -> Tensor:
    return sum_cross_entropy(model(batch.tokens_BT), batch.targets_BT, ignored_target=IGNORED_TARGET)


def measure_decoding(models: Sequence[Decoder], *, num_tokens: int = 48, num_rounds: int = 5) -> list[float]:
    """Measure greedy tokens per second of each model for one sequence: medians over interleaved rounds."""
    num_tokens = min(num_tokens, *(model.config.max_length - 1 for model in models))
    rates: list[list[float]] = [[] for _ in models]
    for round_index in range(num_rounds + 1):
        for model, own_rates in zip(models, rates, strict=True):
            rate = _decode(model, num_tokens)
            if round_index > 0:  # the first round packs weights and fills caches
                own_rates.append(rate)
    return [statistics.median(own_rates) for own_rates in rates]


@torch.inference_mode()
def _decode(model: Decoder, num_tokens: int) -> float:
    cache = model.new_cache(1, num_tokens + 1)
    token_11 = torch.zeros(1, 1, dtype=torch.long)
    began_s = time.perf_counter()
    for position in range(num_tokens):
        positions_11 = torch.full((1, 1), position)
        logits_11V = model(token_11, positions_BT=positions_11, cache=cache.view(0, 1, position + 1))
        token_11 = logits_11V.argmax(dim=-1)
    return num_tokens / (time.perf_counter() - began_s)
