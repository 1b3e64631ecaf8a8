"""How good a model is on data: the metrics of a task over all of them, with the interval each lies in with 95 %.

    report = evaluate_model("runs/notes", "other_notes", changes={})
    report.metrics["perplexity"], report.metrics["perplexity_low"], report.metrics["perplexity_high"]

The settings are those that the model was trained with, where `model` is the folder of a run, or else the defaults of
the task; the data are what is given, all of them, and nothing is trained. A decoder may be an artifact in any
precision, a Hugging Face folder or an adapter; the models of other tasks are opened as training opens them, and are
refused where they have no trained head for the task. The command `deepseek evaluate` calls this.

The loss is a ratio of sums, and its interval comes from resampling batches: rows of text one by one, a few samples of
other data together. Other metrics bring intervals of their own (`scores.py`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from deepseek.artifact.format import TOKENIZER_NAME
from deepseek.artifact.reading import find_model_folder, is_artifact, read_manifest
from deepseek.core.config import list_kinds
from deepseek.core.errors import ConfigError
from deepseek.core.events import Event
from deepseek.core.model_folder import ModelFolder
from deepseek.data.config import ChatConfig, DataConfig
from deepseek.data.samples import TooFewSamplesError
from deepseek.models.adapters import find_tokenizer_folder
from deepseek.models.decoder.model import DecoderConfig
from deepseek.models.loading import load_decoder
from deepseek.train.config import TrainConfig
from deepseek.train.evaluation import measure
from deepseek.train.loop import CONFIG_FILE
from deepseek.train.run_state import open_device, open_precision
from deepseek.train.scores import score_ratio
from deepseek.train.task import LOSS, Task, TaskData
from deepseek.train.task_settings import AnyTaskSettings, DistillationSettings
from deepseek.train.tasks import find_task

MEAN_LOSS, PERPLEXITY = "loss", "perplexity"
_CAUSAL_LM = "causal_lm"
_ROW = 1024  # tokens of a row, where no run says it
_MOST_TOGETHER = 8  # samples of a batch: few, since intervals of the loss come from resampling batches
_LEAST_BATCHES = 10  # for an interval of the loss


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found."""

    model: str
    data: str
    task: str
    unit: str
    """What the loss is a mean over."""
    num_units: int
    metrics: dict[str, float]
    """Metrics by name; `NAME_low` and `NAME_high` are the ends of the interval of NAME."""


def evaluate_model(
    model: str | Path,
    data: str | Path,
    *,
    task: str | None = None,
    changes: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> EvaluationReport:
    """Measure the model in the folder `model` on all of `data`; `changes` are settings as of a run, by dotted name.

    `task` is needed where `model` is no run and no decoder. Raises `ConfigError` where the model does not fit the task,
    and `DataError` for data that cannot be used. Nothing is written.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = configure_evaluation(model, data, task=task, changes=changes or {}).override({"folder": folder})
        device = open_device(config.device)
        learned, opened = _open_data(config, on_event)
        module = _open_model(learned, opened, str(find_model_folder(model))).to(device).eval()
        learned.on_step(module, 0, is_evaluating=True)
        precision, _ = open_precision(config, module, device)
        assert opened.heldout is not None
        measured = measure(learned, module, opened.heldout(), precision=precision, max_units=config.evaluation_units)
    metrics = {MEAN_LOSS: measured.metrics[LOSS]}
    if len(measured.losses) >= _LEAST_BATCHES:
        metrics |= score_ratio(MEAN_LOSS, np.array(measured.losses), np.array(measured.units))
    if learned.unit == "tokens":
        metrics |= {name.replace(MEAN_LOSS, PERPLEXITY): math.exp(loss) for name, loss in metrics.items()}
    metrics |= {name: value for name, value in measured.metrics.items() if name != LOSS}
    return EvaluationReport(str(model), str(data), config.task.kind, learned.unit, sum(measured.units), metrics)


def configure_evaluation(
    model: str | Path, data: str | Path, *, task: str | None, changes: Mapping[str, Any]
) -> TrainConfig:
    """Return the settings of a run on `data` that begins with `model`, of which only the evaluation is done."""
    folder = find_model_folder(model)
    base = _read_run(Path(model) / CONFIG_FILE)
    if base is None and task is None:
        load_decoder(folder)  # whose task is known
    base = base or TrainConfig()
    task = task or base.task.kind
    data_kinds = _known_tasks()[task].data_kinds if task in _known_tasks() else ()
    kind = changes.get("data.kind") or (
        base.data.kind if base.data.kind in data_kinds else next(iter(data_kinds), None)
    )
    settings: dict[str, Any] = {
        "init": str(folder),
        "init_weights": None,
        "init_settings": {},
        "model": DecoderConfig().to_dict(),
        "freeze": [],
        "adapter": None,
        "evaluation_units": 0,
        "precision": "fp32",
        "data.batch_size": 1 if task == _CAUSAL_LM else _MOST_TOGETHER,
    }
    if base.task.kind != task:
        settings["task"] = task
    if base.data.kind != kind:
        settings["data.kind"] = kind
    settings |= {f"data.{name}": value for name, value in _place_data(str(kind), Path(data), folder).items()}
    if task == _CAUSAL_LM:
        longest = load_decoder(folder, verify=False).config.max_length
        length = min(longest, base.data.sequence_length if isinstance(base.data, DataConfig | ChatConfig) else _ROW)
        settings["data.sequence_length"] = length
        if kind == "text":
            # Evaluations read packed rows whatever this says, and it asks for no whole row to train on.
            settings |= {"data.batching": "token_budget", "data.max_len": length, "data.max_tokens": length}
    settings |= _number_classes(task, folder)
    return base.override(settings | dict(changes))


def _read_run(file: Path) -> TrainConfig | None:
    """Return the settings of a run; of one that learned from a teacher, those of the task that was taught."""
    if not file.is_file():
        return None
    config = TrainConfig.from_file(file)
    if isinstance(config.task, DistillationSettings):
        return TrainConfig.from_dict(config.to_dict() | {"task": config.task.of.to_dict()})
    return config


def _place_data(kind: str, data: Path, folder: Path) -> dict[str, Any]:
    """Return the settings that lead to `data`, which is held out and nothing else."""
    if kind == "boxes":
        place = {"annotations": str(data), "images": str(data.parent)}
        return place | {"heldout_annotations": str(data), "heldout_images": None}
    settings: dict[str, Any] = {"sources": [str(data)], "heldout_sources": [str(data)]}
    if kind == "images":
        return settings
    tokenizer = find_tokenizer_folder(folder)
    if not (tokenizer / TOKENIZER_NAME).is_file():
        raise ConfigError(f"{folder} has no {TOKENIZER_NAME}, by which texts become tokens of the model; put it there")
    return settings | {"tokenizer": str(tokenizer)} | ({"chat_template": None} if kind == "chat" else {})


def _number_classes(task: str, folder: Path) -> dict[str, Any]:
    """Return the setting that numbers classes as the model does, also where data have some of them only."""
    setting = {"image_classification": "data.classes", "sequence_classification": "task.labels"}.get(task)
    if setting is None:
        return {}
    names = ModelFolder(folder).config.get("id2label")
    labels: object = None
    if isinstance(names, dict):
        labels = [str(names[number]) for number in sorted(names, key=int)]
    elif is_artifact(folder):
        labels = read_manifest(folder).architecture_config.get("labels")
    return {setting: labels} if labels else {}


def _known_tasks() -> dict[str, type[AnyTaskSettings]]:
    return cast("dict[str, type[AnyTaskSettings]]", list_kinds(TrainConfig, "task"))


def _open_data(config: TrainConfig, on_event: Callable[[Event], None] | None) -> tuple[Task, TaskData]:
    """Prepare and open the data; a set that is smaller than a batch is read sample by sample."""
    task = find_task(config.task.kind)(config)
    folder = Path(config.folder) / "data"
    for event in task.prepare(folder):
        if on_event is not None:
            on_event(event)
    try:
        return task, task.open_data(folder)
    except TooFewSamplesError:
        task = find_task(config.task.kind)(config.override({"data.batch_size": 1}))
        return task, task.open_data(folder)


def _open_model(task: Task, data: TaskData, source: str) -> nn.Module:
    if task.config.task.kind == _CAUSAL_LM:
        return load_decoder(source)
    module = task.build_model(data)
    if task.start is not None and task.start.new_tensors:
        raise ConfigError(
            f"{source} has no trained head for the task {task.config.task.kind} on these data "
            f"({', '.join(task.start.new_tensors[:3])} would be new); give a model that was trained for it, or data "
            "with its classes"
        )
    return module
