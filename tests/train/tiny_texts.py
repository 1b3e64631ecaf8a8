"""Tiny encoders and texts for the tests of text tasks: runs of a second, and tasks that are open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.mixed_precision.forward_precision import Precision
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.run_state import build
from deepseek.train.steps import accumulate_gradients
from deepseek.train.task import Task
from deepseek.train.tasks import find_task

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SGD = {"name": "sgd", "base_learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def configure(folder: Path, task: dict[str, Any], data: dict[str, Any], **changes: Any) -> TrainConfig:
    values = {
        "folder": str(folder),
        "init": "bert-base",
        "init_settings": SHAPE | STILL,
        "task": task,
        "data": {"vocab_size": 300} | data,
        "num_steps": 6,
        "log_every": 1,
        "precision": "fp32",
        "optimizer": {"warmup_steps": 0, "base_learning_rate": 0.1},
    }
    return TrainConfig.from_dict(values | changes)


def open_task(config: TrainConfig) -> tuple[Any, Any, TransformersModel]:
    """The task with its data open and the model that a run begins with, in evaluation mode."""
    task: Task = find_task(config.task.kind)(config)
    folder = Path(config.folder) / "data"
    for _ in task.prepare(folder):
        pass
    run = build(config, task, folder)
    model = run.model.eval()
    assert isinstance(model, TransformersModel)
    return task, run.data, model


def gradients(task: Task, model: nn.Module, batches: list[Any]) -> list[Tensor]:
    """The gradient that a step of these micro-batches takes."""
    model.zero_grad()
    num_units = sum(task.count_units(batch) for batch in batches)
    precision: Precision = "fp32"
    for batch in batches:
        accumulate_gradients(task, model, batch, num_units, precision=precision)
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_accumulation_is_one_batch(task: Any, model: nn.Module, samples: list[Any]) -> None:
    """Micro-batches of unequal size give the gradient of the one batch that they are together."""
    whole = gradients(task, model, [task.collate(samples)])
    parts = gradients(task, model, [task.collate(samples[:1]), task.collate(samples[1:])])
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, one, rtol=1e-4, atol=1e-6)


def assert_resume_is_bit_equal(make: Callable[[str], TrainConfig]) -> None:
    """A run that is stopped after two steps ends with the bytes of one that was not; `make` gives it a folder."""
    whole, stopped = make("whole"), make("stopped")
    for _ in train(whole):
        pass
    for event in train(stopped):
        if event.kind == "step_done" and event.step == 2:
            break
    events = list(train(stopped))
    assert next(event for event in events if event.kind == "run_started").first_step == 2
    first, second = ((Path(config.folder) / "model" / "model.safetensors").read_bytes() for config in (whole, stopped))
    assert first == second
