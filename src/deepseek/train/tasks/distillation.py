"""Learn another task from the probabilities of a teacher, beside the labels (Hinton et al. 2015).

    batch -> student -> its logits --- the task's own loss with the labels ----- hard_share
          -> teacher -> its logits --- divergence of both at a temperature --- 1 - hard_share

`task.of` is the task, with its own settings: any whose answers are classes or tokens (`class_logits`). Everything but
the loss is that task's: data, model, metrics, the way it is saved. The divergence is Kullback-Leibler's, from the
teacher's probabilities to the student's, both softened by `temperature`, times its square, so that the size of its
gradient does not depend on it. Evaluations leave the teacher alone: their loss is the task's own, and can be compared
with that of a run without one. The teacher answers in evaluation mode, without gradients, and is not saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.artifact.format import Manifest
from deepseek.artifact.reading import find_model_folder
from deepseek.core.errors import ConfigError
from deepseek.core.events import Event
from deepseek.data.config import ImagesConfig
from deepseek.data.tokenizing import TOKENIZER_FILE, Tokenizer, load_tokenizer
from deepseek.models.loading import load_model
from deepseek.models.mobilenet_v3.model import MobileNetV3
from deepseek.models.resnet.model import ResNet
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.models.vit.model import ViT
from deepseek.train.config import TrainConfig
from deepseek.train.task import Measurements, Task, TaskData
from deepseek.train.task_settings import DistillationSettings
from deepseek.train.tasks import find_task
from deepseek.train.tasks.image_classification import STEPS_FILE


class Distillation(Task):
    """Another task with a teacher."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        settings = config.task
        assert isinstance(settings, DistillationSettings)
        self.settings = settings
        inner = find_task(settings.of.kind)(config.override({"task": settings.of.to_dict(), "data": config.data}))
        if type(inner).class_logits is Task.class_logits:
            raise ConfigError(f"the task {settings.of.kind} has no classes or tokens that a teacher could have")
        self.inner = inner
        self._teacher: nn.Module | None = None

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The task's own."""
        return self.inner.unit

    def prepare(self, folder: Path) -> Iterator[Event]:
        """Prepare the task's data."""
        return self.inner.prepare(folder)

    def open_data(self, folder: Path) -> TaskData:
        """Open the task's data."""
        return self.inner.open_data(folder)

    def build_model(self, data: TaskData) -> nn.Module:
        """Build the student, and load the teacher; raises `ConfigError` where they do not speak of the same classes."""
        student = self.inner.build_model(data)
        self.start = self.inner.start
        teacher = load_model(self.settings.teacher).module
        if teacher is None or not _are_alike(teacher, student):
            kind = "file that only a runtime can run" if teacher is None else type(teacher).__name__
            raise ConfigError(
                f"the teacher {self.settings.teacher} is a {kind} and the student a {type(student).__name__}; give a "
                "teacher of the student's kind"
            )
        if isinstance(self.config.data, ImagesConfig):
            check_same_steps(self.settings.teacher, self.config.data)
        check_same_answers(self.settings.teacher, teacher, student, data.tokenizer)
        self._teacher = teacher.eval().requires_grad_(False)
        return student

    def on_step(self, model: nn.Module, step: int, *, is_evaluating: bool = False) -> None:
        """As the task does."""
        self.inner.on_step(model, step, is_evaluating=is_evaluating)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return the task's own inputs."""
        return self.inner.inputs(batch)

    def forward(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
        """Return the student's answer, and in training the (N, K) logits of the teacher."""
        if not model.training:
            return self.inner.forward(model, batch), None
        assert self._teacher is not None
        self._teacher.to(next(model.parameters()).device)
        with torch.no_grad():
            taught = self.inner.forward(self._teacher, batch)
            logits_NK = self.inner.class_logits(taught, batch)
        return self.inner.forward(model, batch), logits_NK

    def loss(self, outputs: tuple[Any, Tensor | None], batch: Any) -> Tensor:
        """() sum of both losses over the task's units."""
        answer, taught_NK = outputs
        hard = self.inner.loss(answer, batch)
        if taught_NK is None:
            return hard
        soft = sum_divergence(self.inner.class_logits(answer, batch), taught_NK, self.settings.temperature)
        share = self.settings.hard_share
        return share * hard + (1 - share) * soft

    def count_units(self, batch: Any) -> int:
        """Count the task's own units."""
        return self.inner.count_units(batch)

    def new_metrics(self) -> Measurements | None:
        """Measure what the task measures."""
        measured = self.inner.new_metrics()
        return None if measured is None else _Answers(measured)

    def save(self, model: nn.Module, data: Any, folder: Path, **record: Any) -> Manifest:
        """Save the student as the task does."""
        return self.inner.save(model, data, folder, **record)


class _Answers:
    """The task's measurements, of the student's answers."""

    def __init__(self, measured: Measurements) -> None:
        self._measured = measured

    def update(self, outputs: tuple[Any, Tensor | None], batch: Any) -> None:
        self._measured.update(outputs[0], batch)

    def compute(self) -> dict[str, float]:
        return self._measured.compute()


def sum_divergence(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """Return the () sum over rows of the softened Kullback-Leibler divergence, times the square of the temperature.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> sum_divergence(logits, logits, 2.0).item()
    0.0
    """
    student_NK = (student_NK.float() / temperature).log_softmax(dim=-1)
    teacher_NK = (teacher_NK.float() / temperature).log_softmax(dim=-1)
    return F.kl_div(student_NK, teacher_NK, reduction="sum", log_target=True) * temperature**2


def check_same_answers(source: str, teacher: nn.Module, student: nn.Module, tokenizer: Tokenizer | None) -> None:
    """Raise `ConfigError` unless both models number their classes and their tokens alike."""
    theirs, ours = _describe(teacher), _describe(student)
    have_names = not isinstance(theirs, int) and not isinstance(ours, int)
    if (theirs != ours) if have_names else _count(theirs) != _count(ours):
        raise ConfigError(
            f"the teacher {source} answers with {_name_some(theirs)} and the student with {_name_some(ours)}; give a "
            "teacher that was trained for the same classes, or with the same tokenizer"
        )
    folder = find_model_folder(source)
    if tokenizer is None or not (folder / TOKENIZER_FILE).is_file():
        return
    if load_tokenizer(folder).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise ConfigError(
            f"the teacher {source} has another tokenizer than the student; give data.tokenizer={folder}, or a teacher "
            "that was trained with the same one"
        )


def check_same_steps(source: str, data: ImagesConfig) -> None:
    """Raise `ConfigError` where the teacher's folder says that it sees pixels normalized in another way."""
    file = find_model_folder(source) / STEPS_FILE
    steps = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for setting, name in (("mean", "image_mean"), ("std", "image_std")):
        ours, theirs = getattr(data, setting), steps.get(name)
        if theirs is not None and not np.allclose(theirs, ours):
            raise ConfigError(
                f"the teacher {source} sees images with data.{setting}={theirs} and the student with {list(ours)}; set "
                f"data.{setting} to the teacher's"
            )


def _are_alike(teacher: nn.Module, student: nn.Module) -> bool:
    """Return whether both take the same inputs: models of one class, or any two classifiers of images."""
    return isinstance(teacher, type(student)) or (_classifies_images(teacher) and _classifies_images(student))


def _classifies_images(model: nn.Module) -> bool:
    if isinstance(model, TransformersModel):
        return not model.is_text and model.has_head
    return isinstance(model, ResNet | MobileNetV3 | ViT)


def _describe(model: nn.Module) -> tuple[str, ...] | int:
    """Return the names of the classes in their order, or how many outputs there are."""
    config: Any = model.config
    if not isinstance(model, TransformersModel):
        if labels := getattr(config, "labels", ()):
            return tuple(labels)
        sizes = ("vocab_size", "num_classes")
        return int(next(value for name in sizes if (value := getattr(config, name, None)) is not None))
    if model.predicts_tokens:
        return int(config["vocab_size"])
    names = config.get("id2label") or {}
    return tuple(str(names[number]) for number in sorted(names, key=int))


def _count(answers: tuple[str, ...] | int) -> int:
    return answers if isinstance(answers, int) else len(answers)


def _name_some(answers: tuple[str, ...] | int) -> str:
    if isinstance(answers, int):
        return f"{answers} outputs"
    return f"{len(answers)} classes ({', '.join(answers[:5])}{', ...' * (len(answers) > 5)})"
