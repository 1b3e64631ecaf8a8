"""A tiny decoder with random weights and a tokenizer trained on a few lines, so that every test takes milliseconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from deepseek.data.tokenizing import Tokenizer, train_tokenizer
from deepseek.models.decoder.model import Decoder, DecoderConfig

TEXT = "def add(left, right):\n    return left + right\n\nclass Größe:\n    import os, sys  # 漢字 und Wörter\n"
MAX_LENGTH = 96


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few lines do not give all the tokens that are asked for
        return train_tokenizer(
            [TEXT] * 3, vocab_size=320, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        )


@pytest.fixture(scope="session")
def model(make_model: Callable[[], Decoder]) -> Decoder:
    return make_model()


@pytest.fixture(scope="session")
def make_model(tokenizer: Tokenizer) -> Callable[..., Decoder]:
    """Makes a tiny model of a given subclass of `Decoder`."""

    def make(kind: type[Decoder] = Decoder) -> Decoder:
        return _make_model(tokenizer, kind)

    return make


def _make_model(tokenizer: Tokenizer, kind: type[Decoder]) -> Decoder:
    """Weights are scaled up so that the random model has opinions, and no two logits are nearly equal."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=64,
        max_length=MAX_LENGTH,
        tie_embeddings=False,  # a random tied model repeats its last token
    )
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model
