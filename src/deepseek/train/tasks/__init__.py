"""The tasks by name. Each is a file here with one class, and a class of settings in `task_settings.py`."""

from __future__ import annotations

import importlib

from deepseek.core.registry import Registry
from deepseek.train.task import Task

TASKS: Registry[str] = Registry("task")
"""Name of a task -> file and class, which are imported on first use."""
TASKS.add("causal_lm", "causal_lm:CausalLM")
TASKS.add("masked_lm", "masked_lm:MaskedLM")
TASKS.add("sequence_classification", "sequence_classification:SequenceClassification")
TASKS.add("question_answering", "question_answering:QuestionAnswering")
TASKS.add("sentence_embedding", "sentence_embedding:SentenceEmbedding")
TASKS.add("distillation", "distillation:Distillation")
TASKS.add("image_classification", "image_classification:ImageClassification")
TASKS.add("detection", "detection:Detection")


def find_task(kind: str) -> type[Task]:
    """Return the class of the task `kind`; raises `ConfigError` for an unknown one.

    >>> find_task("causal_lm").unit
    'tokens'
    """
    file, _, name = TASKS[kind].partition(":")
    found: type[Task] = getattr(importlib.import_module(f"{__name__}.{file}"), name)
    return found
