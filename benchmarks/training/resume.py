"""Resuming: for every task, n + n steps give the losses and the weights of 2n, bit for bit.

    python -m benchmarks.train_tasks resume

Each task trains a tiny model twice: in one run, and in one that is left after half of its steps and begun again.
Dropout and augmentation are on, steps are AdamW's, so that generators, moments and the position in the data count.
Compared are the losses of the second half, all bytes of the model, and every number of the last checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measuring
from benchmarks.measuring import Bar, Row, report
from deepseek.checkpoint.restoring import newest_valid
from deepseek.train import TrainConfig, train
from deepseek.train.tasks import TASKS
from tests.data.coco_files import write_squares
from tests.train.test_loop import collect
from tests.train.tiny_texts import SHAPE, write_rows

HALF, QUICK_HALF = 10, 2
WORDS = ("the", "small", "dog", "barks", "at", "a", "cat", "by", "river", "and", "old", "house", "water", "birds")
NUM_ROWS = 60


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common."""

    num_values: int
    """Numbers of the last checkpoint that were compared."""
    first_difference: str
    """What differs, nothing where all is equal."""
    last_loss: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this section."""
    measuring.add_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train every task in one run and in two, and report."""
    half = QUICK_HALF if arguments.quick else HALF
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        for task in TASKS:
            if task not in SETTINGS:
                rows.append(Row(task, 0.0, None, None, "not compared; add it to benchmarks/training/resume.py"))
                continue
            found = compare(lambda name, task=task: configure(folder, task, name, 2 * half), half)
            note = found.first_difference or f"{found.num_values} numbers, last loss {found.last_loss:.4f}"
            rows.append(Row(task, float(not found.first_difference), None, None, note))
    bar = Bar("tasks that resume bit-equal, share", sum(row.median or 0.0 for row in rows) / len(rows), 1.0)
    report("train_tasks resume", f"1 where {half} + {half} steps equal {2 * half}", rows, [bar], arguments)


def compare(make: Callable[[str], TrainConfig], half: int) -> Comparison:
    """Train a run and one that is stopped; `make` gives their configs by name."""
    whole, stopped = make("whole"), make("stopped")
    expected = read_losses(whole)
    events = train(stopped)
    for event in events:
        if event.kind == "step_done" and event.step == half:
            break
    events.close()
    rest = read_losses(stopped)
    theirs, ours = read_checkpoint(whole), read_checkpoint(stopped)
    models = [(Path(config.folder) / "model" / "model.safetensors").read_bytes() for config in (whole, stopped)]
    differences = [f"the loss of step {step}" for step, loss in rest.items() if loss != expected[step]]
    if min(rest) != half + 1:
        differences.append(f"the second run began with step {min(rest)}")
    if models[0] != models[1]:
        differences.append("the model")
    if theirs.keys() != ours.keys():
        differences.append("what the checkpoint holds")
    differences += [name for name in theirs if name in ours and not torch.equal(theirs[name], ours[name])]
    num_values = sum(value.numel() for value in theirs.values())
    return Comparison(num_values, differences[0] if differences else "", expected[max(expected)])


def read_losses(config: TrainConfig) -> dict[int, float]:
    """Train, and return the loss of each step."""
    return {event.step: event.loss for event in train(config) if event.kind == "step_done"}


def read_checkpoint(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return every number of the run's last checkpoint by its path: weights, moments, generators, position."""
    checkpoint = newest_valid(Path(config.folder) / "checkpoints")
    assert checkpoint is not None
    values: dict[str, torch.Tensor] = {}
    collect(checkpoint.state, (), values)
    return values


def write_data(folder: Path) -> None:
    """Write lines of words, a table, and images with boxes."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(NUM_ROWS):
        text, pair = (" ".join(random.choice(WORDS, size=random.integers(6, 16))) for _ in range(2))
        answer = text.split()[3]
        answers = {"text": [answer], "answer_start": [len(" ".join(text.split()[:3])) + 1]}
        label = WORDS[number % 2]
        rows.append(
            {"text": text, "text_pair": pair, "label": label, "question": "what", "context": text, "answers": answers}
        )
    write_rows(folder / "rows.jsonl", rows)
    lines = [" ".join(random.choice(WORDS, size=random.integers(4, 20))) for _ in range(400)]
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    write_squares(folder / "squares", 24)


def configure(folder: Path, task: str, name: str, num_steps: int) -> TrainConfig:
    """Return the config of one run of a task."""
    if task == "distillation" and not (folder / "teacher").exists():
        for _ in train(configure(folder, "sequence_classification", "teacher", 1)):
            pass
        (folder / "sequence_classification-teacher").rename(folder / "teacher")
    values: dict[str, Any] = {
        "folder": str(folder / f"{task}-{name}"),
        "optimizer": {"base_learning_rate": 0.1, "warmup_steps": 1},
        "precision": "fp32",
        "num_steps": num_steps,
        "log_every": 1,
    }
    return TrainConfig.from_dict(values | {"task": {"kind": task}} | SETTINGS[task](folder))


def text_settings(folder: Path) -> dict[str, Any]:
    """Settings of tasks on plain text, apart from the model."""
    lines = {"sources": [str(folder / "lines.txt")], "document_separator": "\n", "vocab_size": 300}
    return {"data": lines | {"sequence_length": 24, "batch_size": 4}}


def masked_settings(folder: Path) -> dict[str, Any]:
    """Settings of masked language modeling."""
    data = text_settings(folder)["data"] | {"tokenizer_kind": "wordpiece"}
    return {"init": "bert-base", "init_settings": SHAPE, "data": data}


def table_settings(folder: Path) -> dict[str, Any]:
    """Settings of tasks on rows of a table."""
    data = {"sources": str(folder / "rows.jsonl"), "batch_size": 4, "max_len": 24, "vocab_size": 300}
    return {"init": "bert-base", "init_settings": SHAPE, "data": data}


def question_settings(folder: Path) -> dict[str, Any]:
    """Settings of answering questions."""
    return table_settings(folder) | {"task": {"kind": "question_answering", "stride": 4}}


def distillation_settings(folder: Path) -> dict[str, Any]:
    """Settings of a student."""
    teacher = str(folder / "teacher" / "model")
    settings = table_settings(folder)
    return settings | {
        "task": {"kind": "distillation", "teacher": teacher, "of": {"kind": "sequence_classification"}},
        "data": settings["data"] | {"tokenizer": teacher},
    }


def image_settings(_: Path) -> dict[str, Any]:
    """Settings of a classifier of images, with dropout and a process that loads."""
    return {
        "init": "mobilenet_v3_small",
        "init_settings": {"width_multiple": 0.25},
        "data": {"sources": "digits", "image_size": 32, "batch_size": 16, "num_workers": 1},
    }


def detection_settings(folder: Path) -> dict[str, Any]:
    """Settings of a detector, which keeps an average of its weights."""
    squares = folder / "squares"
    data = {"annotations": str(squares / "boxes.json"), "images": str(squares / "images"), "image_size": 64}
    return {
        "task": {"kind": "detection", "anchors": "data"},
        "init": "yolov7-tiny",
        "init_settings": {"width_multiple": 0.125},
        "data": data | {"batch_size": 4, "num_workers": 1},
        "optimizer": {"base_learning_rate": 2e-3, "reference_batch_size": 4, "warmup_steps": 1},
        "ema_decay": 0.9,
    }


def decoder_settings(folder: Path) -> dict[str, Any]:
    """Settings of a decoder with experts."""
    model = {"vocab_size": 300, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_length": 64}
    return text_settings(folder) | {"model": model | {"moe": {"num_experts": 4, "ffn_size": 32}}, "accum_steps": 2}


SETTINGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "causal_lm": decoder_settings,
    "masked_lm": masked_settings,
    "sequence_classification": table_settings,
    "question_answering": question_settings,
    "sentence_embedding": table_settings,
    "distillation": distillation_settings,
    "image_classification": image_settings,
    "detection": detection_settings,
}
