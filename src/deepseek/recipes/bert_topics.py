"""The topics of texts, learned by the BERT of the recipe `bert_small`: what pretraining is for.

`data.sources` names a table with a column `text` and a column `label`. With `init=bert-base` and the settings of
`bert_small`, the same run begins with random weights, which shows what the pretraining brought.
"""

from __future__ import annotations

from deepseek.data.config import TableConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import StoppingConfig, TrainConfig
from deepseek.train.task_settings import SequenceClassificationSettings


def bert_topics() -> TrainConfig:
    """Return the config of a classifier that begins with `runs/bert_small/model`, for a table of your own."""
    return TrainConfig(
        folder="runs/bert_topics",
        task=SequenceClassificationSettings(),
        init="runs/bert_small/model",
        data=TableConfig(sources=("topics.jsonl",), max_len=128, batch_size=32),
        optimizer=OptimizerConfig(base_learning_rate=2e-3, warmup_steps=50),
        num_steps=600,
        evaluate_every=100,
        stopping=StoppingConfig(metric="accuracy", keep_best=True),
    )
