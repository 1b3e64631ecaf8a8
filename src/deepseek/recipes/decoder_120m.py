"""The text-generation and question-answering model of the first generation: 120 M parameters, dynamic mask.

Its documents give the size, the mask (local up to a distance of 5 beside global attention), AdamW with weight decay
0.01, the linear learning-rate rule, BPE and rows of up to 2,048 tokens; what they leave open is chosen as in Llama.
"""

from __future__ import annotations

from deepseek.data.config import DataConfig
from deepseek.models.decoder.model import DecoderConfig
from deepseek.nn.masks import MaskConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig


def decoder_120m() -> TrainConfig:
    """Return the config of a 120 M parameter dense decoder; give it your own text with `data.sources`."""
    return TrainConfig(
        folder="runs/decoder_120m",
        model=DecoderConfig(
            vocab_size=49152,
            num_layers=12,
            hidden_size=768,
            num_heads=12,
            ffn_size=2048,
            max_length=2048,
            mask=MaskConfig(local_distance=5, opening_steps=1000),
        ),
        data=DataConfig(sources=("stdlib",), vocab_size=49152, sequence_length=2048, batch_size=4),
        optimizer=OptimizerConfig(weight_decay=0.01, schedule="cosine", warmup_steps=500),
        num_steps=20_000,
        accum_steps=64,
        compile="blocks",
    )
