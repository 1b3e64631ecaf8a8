"""A decoder small enough to try things out on: Llama's shape, so its artifact is a Hugging Face folder as well."""

from __future__ import annotations

from deepseek.data.config import DataConfig
from deepseek.models.decoder.model import DecoderConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig


def decoder_tiny() -> TrainConfig:
    """Return the config of a 2.4 M parameter dense decoder on Python's own source code."""
    return TrainConfig(
        folder="runs/decoder_tiny",
        model=DecoderConfig(
            vocab_size=4096,
            num_layers=4,
            hidden_size=192,
            num_heads=6,
            num_kv_heads=2,
            ffn_size=512,
            max_length=512,
        ),
        data=DataConfig(sources=("stdlib",), vocab_size=4096, sequence_length=128, batch_size=16),
        optimizer=OptimizerConfig(base_learning_rate=0.048, weight_decay=0.1, schedule="trapezoid"),
        num_steps=300,
        checkpoint_every=100,
    )
