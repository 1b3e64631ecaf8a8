"""The loss is that of the formula, the student learns what the teacher knows, and one that does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deepseek.core.errors import ConfigError
from deepseek.models.loading import load_model
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.tasks.distillation import sum_divergence
from tests.train.tiny_texts import (
    SGD,
    SHAPE,
    STILL,
    assert_accumulation_is_one_batch,
    assert_resume_is_bit_equal,
    configure,
    open_task,
    write_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore:the texts yield")
TOPICS = {"animals": ["dog", "cat", "bird", "barks"], "places": ["house", "river", "garden", "water"]}
SMALL = SHAPE | STILL | {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}


def draw_rows(num: int = 50) -> list[dict[str, str]]:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        topic = str(random.choice(list(TOPICS)))
        words = [str(word) for word in random.choice(TOPICS[topic], size=random.integers(2, 7))]
        rows.append({"text": " ".join(words), "label": topic})
    return rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", draw_rows())


@pytest.fixture(scope="module")
def teacher(table: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    data = {"sources": table, "batch_size": 4, "max_len": 16}
    optimizer = {"warmup_steps": 0, "base_learning_rate": 0.5}
    list(train(configure(folder, {"kind": "sequence_classification"}, data, num_steps=30, optimizer=optimizer)))
    return str(folder / "model")


def make(folder: Path, table: str, teacher: str, settings: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    task = {"kind": "distillation", "teacher": teacher, "of": {"kind": "sequence_classification"}} | (settings or {})
    data = {"sources": table, "batch_size": 4, "max_len": 16, "tokenizer": teacher}
    return configure(folder, task, data, **({"init_settings": SMALL} | changes))


@pytest.mark.parametrize(("temperature", "hard_share"), [(1.0, 0.5), (3.0, 0.0), (2.0, 1.0)])
def test_the_loss_is_hintons(temperature: float, hard_share: float, table: str, teacher: str, tmp_path: Path) -> None:
    settings = {"temperature": temperature, "hard_share": hard_share}
    task, data, model = open_task(make(tmp_path, table, teacher, settings))
    batch = data.loader.next_batch()
    model.train()
    loss = task.loss(task.forward(model, batch), batch)
    taught = load_model(teacher).module
    assert isinstance(taught, TransformersModel)
    scores, wanted = model.model(**batch.inputs).logits, taught.model(**batch.inputs).logits
    shares = (wanted / temperature).softmax(-1)
    divergence = (shares * (shares.log() - (scores / temperature).log_softmax(-1))).sum()
    hard = F.cross_entropy(scores, batch.labels_B, reduction="sum")
    torch.testing.assert_close(loss, hard_share * hard + (1 - hard_share) * temperature**2 * divergence)
    model.eval()
    torch.testing.assert_close(task.loss(task.forward(model, batch), batch), hard)


def test_the_divergence_of_equal_logits_is_nothing_and_else_positive() -> None:
    logits, others = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert sum_divergence(logits, logits, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert sum_divergence(logits, others, 2.0).item() > 0


def test_micro_batches_of_unequal_size_add_up(table: str, teacher: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, table, teacher, optimizer=SGD))
    task.collate = task.inner.collate
    model.train()
    assert_accumulation_is_one_batch(task, model, data.loader.source.samples[:5])


def test_a_stopped_run_becomes_bit_equal(table: str, teacher: str, tmp_path: Path) -> None:
    shape = {"init_settings": SMALL | {"hidden_dropout_prob": 0.1}}
    assert_resume_is_bit_equal(lambda name: make(tmp_path / name, table, teacher, **shape))


def test_a_student_without_labels_learns_what_the_teacher_knows(table: str, teacher: str, tmp_path: Path) -> None:
    optimizer = {"warmup_steps": 0, "base_learning_rate": 1.0}
    config = make(tmp_path, table, teacher, {"hard_share": 0.0}, num_steps=40, optimizer=optimizer)
    events = list(train(config))
    metrics = next(event for event in events if event.kind == "evaluated").metrics
    assert metrics["accuracy"] > 0.9
    student = load_model(tmp_path / "model")
    assert student.classify("dog barks")[0][0][0] == "animals"
    assert isinstance(student.module, TransformersModel)
    assert student.module.config["hidden_size"] == 16


def test_a_language_model_learns_from_a_teacher_too(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(row["text"] for row in draw_rows()))
    data = {
        "sources": str(tmp_path / "text.txt"),
        "document_separator": "\n",
        "tokenizer_kind": "wordpiece",
        "sequence_length": 12,
        "batch_size": 4,
    }
    list(train(configure(tmp_path / "first", {"kind": "masked_lm"}, data)))
    taught = str(tmp_path / "first" / "model")
    task = {"kind": "distillation", "teacher": taught, "of": {"kind": "masked_lm"}}
    events = list(train(configure(tmp_path / "second", task, data | {"tokenizer": taught}, init_settings=SMALL)))
    assert events[-1].kind == "model_saved"
    assert next(event for event in events if event.kind == "run_started").unit == "tokens"


def test_a_teacher_of_other_classes_or_another_kind_is_refused(table: str, teacher: str, tmp_path: Path) -> None:
    rows = [row | {"label": f"{row['label']}!"} for row in draw_rows()]
    other = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=r"answers with 2 classes \(animals, places\) and the student with 2 classes"):
        open_task(make(tmp_path / "run", other, teacher))
    refused = pytest.raises(ConfigError, match=r"the teacher resnet18 is a ResNet and the student a TransformersModel")
    with refused, pytest.warns(UserWarning, match="random weights"):
        open_task(make(tmp_path / "run", table, teacher, {"teacher": "resnet18"}))
    assert not (tmp_path / "run" / "model").exists()


def test_a_teacher_with_another_tokenizer_is_refused(table: str, teacher: str, tmp_path: Path) -> None:
    rows = [row | {"text": row["text"] + " somewhere"} for row in draw_rows()]
    other = write_rows(tmp_path / "rows.jsonl", rows)
    config = make(tmp_path / "run", other, teacher).override({"data.tokenizer": None})
    with pytest.raises(ConfigError, match=r"has another tokenizer than the student; give data\.tokenizer="):
        open_task(config)


def test_a_regression_has_no_teacher(table: str, teacher: str, tmp_path: Path) -> None:
    of = {"kind": "sequence_classification", "is_regression": True}
    with pytest.raises(ConfigError, match="a regression has no classes"):
        make(tmp_path / "run", table, teacher, {"of": of})
