"""How good a model is on data: the metrics of a task over all of them, with the interval each lies in with 95 %.

    report = evaluate_model("runs/notes", "other_notes")
    report.metrics["perplexity"], report.metrics["perplexity_low"], report.metrics["perplexity_high"]
    evaluate_model("runs/notes").data               "what the run runs/notes held out of notes"

The settings are those that the model was trained with, where `model` is the folder of a run, or else the defaults of
the task; the data are what is given, all of them, or what the run held out. Nothing is trained. A decoder may be an
artifact in any precision, a Hugging Face folder or an adapter; the models of other tasks are opened as training opens
them, and are refused where they have no trained head for the task. The command `deepseek evaluate` calls this.

The loss is a ratio of sums, and its interval comes from resampling what does not depend on each other: documents,
chats, questions, images; batches, which are rows of text, where there are too few of these or the task knows none.
Other metrics bring intervals of their own (`scores.py`, `average_precision.py`).
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from deepseek.artifact.format import CONFIG_NAME, TOKENIZER_NAME
from deepseek.artifact.reading import find_model_folder, is_adapter, is_artifact, read_manifest
from deepseek.core.config import list_kinds
from deepseek.core.errors import ConfigError, DataError
from deepseek.core.events import Event
from deepseek.core.model_folder import ModelFolder
from deepseek.data.config import BoxesConfig, ChatConfig, DataConfig
from deepseek.data.samples import TooFewSamplesError
from deepseek.models.adapters import find_tokenizer_folder
from deepseek.models.architectures import DECODER, OWN, TRANSFORMERS
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import load_decoder
from deepseek.models.model_sources import explain_nothing, load_weights_
from deepseek.train.config import TrainConfig
from deepseek.train.evaluation import BatchMeasurements, measure
from deepseek.train.loop import CONFIG_FILE, DATA_FOLDER
from deepseek.train.run_state import open_device, open_precision
from deepseek.train.scores import LEAST_RESAMPLED, score_ratio
from deepseek.train.task import LOSS, Task, TaskData
from deepseek.train.task_settings import AnyTaskSettings, DistillationSettings
from deepseek.train.tasks import find_task

MEAN_LOSS, PERPLEXITY = "loss", "perplexity"
_CAUSAL_LM = "causal_lm"
_CONTRASTIVE = "sentence_embedding"
_ROW = 1024  # tokens of a row, where no run says it
_MOST_TOGETHER = 8  # samples of a batch: few, since intervals may come from resampling batches
_TEXT_TASKS = (_CAUSAL_LM, "masked_lm")  # whose batches are rows of text, one by one


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found."""

    model: str
    data: str
    """What was given, or what the run of the model held out."""
    task: str
    unit: str
    """What the loss is a mean over."""
    num_units: int
    metrics: dict[str, float]
    """Metrics by name; `NAME_low` and `NAME_high` are the ends of the interval of NAME."""


@dataclass(frozen=True, eq=False)
class _Subject:
    """The model that is measured."""

    name: str
    folder: Path
    run: Path | None
    """The folder of the run that made it, where that is here."""
    settings: TrainConfig | None
    """The settings of that run; of one that learned from a teacher, those of the task that was taught."""


def evaluate_model(
    model: str | Path,
    data: str | Path | None = None,
    *,
    task: str | type[Task] | None = None,
    changes: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> EvaluationReport:
    """Measure the model in the folder `model` on all of `data`; `changes` are settings as of a run, by dotted name.

    Without `data`, on what the run that made the model held out. `task` is needed where `model` is no run and no
    decoder; it may be a class of your own, whose model is opened as it was trained. Raises `ConfigError` where the
    model does not fit the task, or no data are known, and `DataError` for data that cannot be used. Nothing is written.
    """
    subject = _find_subject(model, data)
    if not subject.folder.exists():
        raise explain_nothing(model, subject.folder)
    kind = task if isinstance(task, str) else _choose_task(subject) if task is None else None
    decoder = load_decoder(subject.folder) if kind == _CAUSAL_LM else None
    with tempfile.TemporaryDirectory() as folder:
        config = _configure(subject, data, kind, changes or {}, decoder).override({"folder": folder})
        device = open_device(config.device)
        learned = find_task(config.task.kind) if task is None or isinstance(task, str) else task
        try:
            opened_task, opened = _open_data(learned, config, subject.run if data is None else None, on_event)
        except DataError as error:
            if data is not None:
                raise
            raise DataError(
                f"what {subject.run} was trained on cannot be measured on any more ({error}); give other data with "
                "--data or data="
            ) from error
        if opened.heldout is None:
            raise ConfigError(f"{subject.run or subject.name} held nothing out; give data with --data or data=")
        module = decoder or _open_model(opened_task, opened, subject, is_own=kind is None)
        module = module.to(device).eval()
        opened_task.on_step(module, 0, is_evaluating=True)
        precision, _ = open_precision(config, module, device)
        measured = measure(
            opened_task,
            module,
            opened.heldout(),
            precision=precision,
            max_units=config.evaluation_units,
            by_unit=True,
            on_event=on_event,
        )
    place = _describe_heldout(subject, config) if data is None else str(data)
    name = kind or learned.__name__
    return EvaluationReport(
        subject.name, place, name, opened_task.unit, measured.num_units, _score(measured, opened_task.unit)
    )


def _score(measured: BatchMeasurements, unit: str) -> dict[str, float]:
    """Return all metrics, each with its interval where it has one."""
    metrics = {MEAN_LOSS: measured.metrics[LOSS]}
    groups = measured.losses.largest
    if len(groups) >= LEAST_RESAMPLED:
        sums, counts = zip(*groups, strict=True)
        metrics = score_ratio(MEAN_LOSS, np.array(sums), np.array(counts)) | metrics
    if unit == "tokens":
        metrics |= {name.replace(MEAN_LOSS, PERPLEXITY): math.exp(loss) for name, loss in metrics.items()}
    return metrics | {name: value for name, value in measured.metrics.items() if name != LOSS}


def _find_subject(model: str | Path, data: str | Path | None) -> _Subject:
    folder, run = find_model_folder(model), Path(model)
    if (settings := _read_run(run / CONFIG_FILE)) is not None:
        return _Subject(str(model), folder, run, settings)
    run = folder.resolve().parent
    # What data the model itself was trained on is asked only where none are given. Any folder may lie beside a config;
    # a run's own model has the digest of its config.
    if data is None and is_artifact(folder) and (run / CONFIG_FILE).is_file():
        own = TrainConfig.from_file(run / CONFIG_FILE)
        if read_manifest(folder).config_digest == own.digest:
            return _Subject(str(model), folder, run, _read_run(run / CONFIG_FILE))
    return _Subject(str(model), folder, None, None)


def _choose_task(subject: _Subject) -> str:
    """Return the task that the model was trained for; raises `ConfigError` where only its owner knows it."""
    if _is_own(subject.folder):
        raise ConfigError(
            f"{subject.folder} is a model of a class of its own, which only its task can build; name the task with "
            "--task MODULE:CLASS"
        )
    if subject.settings is None and (other := _name_other_than_decoder(subject.folder)):
        raise ConfigError(
            f"{subject.folder} holds a {other}, and what it was trained for is known to its run alone; name the task "
            "with --task"
        )
    return _CAUSAL_LM if subject.settings is None else subject.settings.task.kind


def _name_other_than_decoder(folder: Path) -> str | None:
    """Return the architecture of a model that is plainly no language model, `None` for all others."""
    if is_adapter(folder):
        return None
    if is_artifact(folder) and (name := read_manifest(folder).architecture) not in (DECODER, TRANSFORMERS):
        return name
    names = (ModelFolder(folder).config if (folder / CONFIG_NAME).is_file() else {}).get("architectures") or [""]
    is_other = re.search(r"For(?!CausalLM)[A-Z]", str(names[0]))
    return str(names[0]) if is_other else None


def _configure(
    subject: _Subject,
    data: str | Path | None,
    task: str | None,
    changes: Mapping[str, Any],
    decoder: Decoder | None,
) -> TrainConfig:
    """Return the settings of a run that begins with the model, of which only the evaluation is done.

    `task` is `None` for a task of one's own.
    """
    folder = subject.folder
    if subject.settings is None and data is None and task is not None:
        raise ConfigError(
            f"{subject.name} was made by no run that is still here, so that no data of its own are known; give data "
            "with --data or data="
        )
    base = subject.settings or TrainConfig()
    task = task or base.task.kind
    data_kinds = _known_tasks()[task].data_kinds if task in _known_tasks() else ()
    kind = changes.get("data.kind") or (
        base.data.kind if base.data.kind in data_kinds else next(iter(data_kinds), None)
    )
    settings: dict[str, Any] = {"freeze": [], "adapter": None, "evaluation_units": 0, "precision": "fp32"}
    if not _is_own(folder):
        settings |= {"init": str(folder), "init_weights": None, "init_settings": {}, "model": DecoderConfig().to_dict()}
    if base.task.kind != task:
        settings["task"] = task
    if base.data.kind != kind:
        settings["data.kind"] = kind
    if task != _CONTRASTIVE or subject.settings is None:  # whose loss depends on what is in a batch
        settings["data.batch_size"] = 1 if task in _TEXT_TASKS else _MOST_TOGETHER
    if data is not None:
        settings |= {f"data.{name}": value for name, value in _place_data(str(kind), Path(data), folder).items()}
    elif (tokenizer := find_tokenizer_folder(folder) / TOKENIZER_NAME).is_file():
        # The one that the run learned or was given, with its template.
        settings |= {"data.tokenizer": str(tokenizer.parent)} | ({"data.chat_template": None} if kind == "chat" else {})
    if decoder is not None:
        own = base.data.sequence_length if isinstance(base.data, DataConfig | ChatConfig) else _ROW
        length = min(decoder.config.max_length, own)
        settings["data.sequence_length"] = length
        if kind == "text":
            # Evaluations read packed rows whatever this says, and it asks for no whole row to train on.
            settings |= {"data.batching": "token_budget", "data.max_len": length, "data.max_tokens": length}
    settings |= _number_classes(task, folder)
    return base.override(settings | dict(changes))


def _is_own(folder: Path) -> bool:
    """Return whether the model is of a class that only its owner's task can build."""
    return is_artifact(folder) and read_manifest(folder).architecture.startswith(OWN)


def _describe_heldout(subject: _Subject, config: TrainConfig) -> str:
    """Say what is measured on where nothing was given."""
    run, data = subject.run or subject.name, config.data
    if subject.settings is None:
        return f"what the task of {run} holds out"
    places: tuple[str, ...] = (data.annotations,) if isinstance(data, BoxesConfig) else data.sources
    others = data.heldout_annotations if isinstance(data, BoxesConfig) else ", ".join(data.heldout_sources)
    return f"what the run {run} held out" + (f": {others}" if others else f" of {', '.join(places)}")


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


def _open_data(
    learned: type[Task], config: TrainConfig, run: Path | None, on_event: Callable[[Event], None] | None
) -> tuple[Task, TaskData]:
    """Prepare and open the data; a set that is smaller than a batch is read sample by sample.

    What `run` has prepared is taken up where it fits: its files are linked, and never written to.
    """
    task = learned(config)
    folder = Path(config.folder) / DATA_FOLDER
    if run is not None and (run / DATA_FOLDER).is_dir():
        shutil.copytree((run / DATA_FOLDER).resolve(), folder, copy_function=os.symlink)
    for event in task.prepare(folder):
        if on_event is not None:
            on_event(event)
    try:
        return task, task.open_data(folder)
    except TooFewSamplesError:
        task = learned(config.override({"data.batch_size": 1}))
        return task, task.open_data(folder)


def _open_model(task: Task, data: TaskData, subject: _Subject, *, is_own: bool) -> nn.Module:
    """Build the model of the task with the weights that were trained."""
    folder = subject.folder
    if is_own and is_adapter(folder):
        raise ConfigError(
            f"{folder} is an adapter, and a task of your own builds its model alone; make one model of both with "
            "`deepseek merge-adapter` and measure that"
        )
    module = task.build_model(data)
    if is_own and (task.start is None or _is_own(folder)):
        load_weights_(module, folder)
    elif task.start is not None and task.start.new_tensors:
        raise ConfigError(
            f"{folder} has no trained head for the task {task.config.task.kind} on these data "
            f"({', '.join(task.start.new_tensors[:3])} would be new); give a model that was trained for it, or data "
            "with its classes"
        )
    return module
