"""The quickstart's training run: a small mixture of experts that learns Python from Python's own library.

Chosen by measuring on two cores (see docs/log.md): rows of 128 tokens, 16 at a time, beat longer rows and smaller
batches for one amount of time; a peak of 3e-3, 96 times what the linear rule with its usual base would give. It takes
under two minutes where bf16 is fast and under four where it is not; a number of steps decides, so that results do not.
"""

from __future__ import annotations

from deepseek.data.config import DataConfig
from deepseek.models.decoder.model import DecoderConfig
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig


def quickstart() -> TrainConfig:
    """Return the config of a 6.6 M parameter MoE with the dynamic local/global mask, trained on 0.7 M tokens."""
    return TrainConfig(
        folder="runs/quickstart",
        model=DecoderConfig(
            vocab_size=4096,
            num_layers=4,
            hidden_size=256,
            num_heads=4,
            num_kv_heads=2,
            max_length=512,
            moe=MoEConfig(num_experts=4, top_k=2, ffn_size=384, capacity_factor=1.25, balance_rate=0.001),
            mask=MaskConfig(local_heads=0.5, opening_steps=100),
        ),
        data=DataConfig(sources=("stdlib",), vocab_size=4096, sequence_length=128, batch_size=16),
        optimizer=OptimizerConfig(
            name="muon",
            base_learning_rate=0.048,
            weight_decay=0.1,
            schedule="trapezoid",
            warmup_steps=20,
            decay_share=0.5,
        ),
        num_steps=350,
        compile="blocks",
        checkpoint_every=50,
        log_every=5,
    )
