"""Answers to questions about Python's standard library, found in its docstrings.

`compose_data()` composes the questions from the running Python (stdlib_questions.py says how) and has to be called
once, before the run. Training begins with the model of `bert_small`; `init` names another encoder, such as the folder
of a MiniLM.
"""

from __future__ import annotations

from pathlib import Path

from deepseek.data.config import TableConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.recipes.stdlib_questions import compose_questions, measure_baselines
from deepseek.train.config import TrainConfig
from deepseek.train.task_settings import QuestionAnsweringSettings


def bert_answers() -> TrainConfig:
    """Return the config of a model that answers questions from a text, for the questions of `compose_data`."""
    return TrainConfig(
        folder="runs/bert_answers",
        task=QuestionAnsweringSettings(max_answer_tokens=40),
        init="runs/bert_small/model",
        data=TableConfig(
            sources=("questions/train.jsonl",), heldout_sources=("questions/heldout.jsonl",), max_len=192, batch_size=16
        ),
        optimizer=OptimizerConfig(base_learning_rate=3e-4, reference_batch_size=16, warmup_steps=50, betas=(0.9, 0.98)),
        num_steps=600,
        evaluate_every=200,
    )


def compose_data(folder: Path = Path("questions")) -> dict[str, dict[str, float]]:
    """Compose the questions that the recipe learns from and return what answering without learning scores on them."""
    compose_questions(folder)
    return measure_baselines(folder)
