"""A tiny mixture of experts whose loss depends on its weights, its tokenizer, and text to compare on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek.data.batching import IGNORED_TARGET, Batch
from deepseek.data.tokenizing import Tokenizer, train_tokenizer
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import save_model
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig

CONFIG = DecoderConfig(
    vocab_size=257,
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    ffn_size=48,
    max_length=32,
    moe=MoEConfig(num_experts=3, top_k=2, ffn_size=24),
    mask=MaskConfig(local_heads=0.5),
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["ab"], vocab_size=257)


@pytest.fixture(scope="session")
def model() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # a model with opinions, whose loss a wrong weight changes
    return model.eval()


@pytest.fixture
def source(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model", tokenizer=tokenizer, config_digest="a run", metrics={"heldout_loss": 9.0})
    return tmp_path / "model"


@pytest.fixture
def batches() -> list[Batch]:
    """Rows of unequal lengths, so that a mean of means would show."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for num_rows, num_kept in ((4, 20), (2, 3), (1, 1)):
        tokens = torch.randint(0, 257, (num_rows, 21), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[:, num_kept:] = IGNORED_TARGET
        made.append(Batch(tokens[:, :-1].contiguous(), targets, num_rows * num_kept))
    return made
