"""A small BERT from random weights by masked language modeling; `bert_topics` goes on from it.

Four layers of 256 channels, as the BERT-mini of Turc et al. (2019), with rows of 128 tokens. As in Geiping and
Goldstein (2023), who pretrain for a day instead of weeks, a quarter of the tokens is predicted, and there is no
dropout, which a model that sees its text a few times does not need and which takes a quarter of a step on a CPU. A step
takes about 1.6 seconds of a core that has AVX2 alone. Its WordPiece tokenizer is trained on the text.
"""

from __future__ import annotations

from deepseek.data.config import DataConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig
from deepseek.train.task_settings import MaskedLMSettings


def bert_small() -> TrainConfig:
    """Return the config of a BERT with 5.4 M parameters; give it your own text with `data.sources`."""
    return TrainConfig(
        folder="runs/bert_small",
        task=MaskedLMSettings(mask_share=0.25),
        init="bert-base",
        init_settings={
            "num_hidden_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "max_position_embeddings": 256,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        data=DataConfig(
            sources=("stdlib",), tokenizer_kind="wordpiece", vocab_size=8192, sequence_length=128, batch_size=16
        ),
        optimizer=OptimizerConfig(base_learning_rate=1.6e-2, betas=(0.9, 0.98), schedule="trapezoid", warmup_steps=100),
        num_steps=1000,
        evaluate_every=250,
        evaluation_units=20_000,
    )
