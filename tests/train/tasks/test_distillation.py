"""The loss is that of the formula, the student learns what the teacher knows, and one that does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from deepseek.core.errors import ConfigError
from deepseek.models.loading import load_model
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.tasks import find_task
from deepseek.train.tasks.distillation import sum_divergence
from tests.train.tasks import test_image_classification
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


def hintons_loss(scores: Tensor, wanted: Tensor, hard: Tensor, temperature: float, hard_share: float) -> Tensor:
    """The formula, in float64."""
    scores, wanted = scores.double() / temperature, wanted.double() / temperature
    shares = wanted.softmax(-1)
    divergence = (shares * (shares.log() - scores.log_softmax(-1))).sum()
    return hard_share * hard.double() + (1 - hard_share) * temperature**2 * divergence


@pytest.mark.filterwarnings("ignore:.*longer than a row")
def test_a_decoder_learns_from_a_teacher_by_the_formula(tmp_path: Path) -> None:
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 32, "max_length": 16, "vocab_size": 280}
    (tmp_path / "text.txt").write_text("\n".join(row["text"] for row in draw_rows()))
    values = {
        "folder": str(tmp_path / "teacher"),
        "model": shape,
        "data": {
            "sources": str(tmp_path / "text.txt"),
            "document_separator": "\n",
            "vocab_size": 280,
            "sequence_length": 12,
            "batch_size": 4,
        },
        "num_steps": 4,
        "precision": "fp32",
    }
    list(train(TrainConfig.from_dict(values)))
    taught = str(tmp_path / "teacher" / "model")
    settings = {"kind": "distillation", "teacher": taught, "of": "causal_lm", "temperature": 3.0, "hard_share": 0.25}
    values |= {"folder": str(tmp_path / "student"), "task": settings, "model": shape | {"hidden_size": 8}}
    values["data"] = {**values["data"], "tokenizer": taught, "batching": "packed_documents"}  # type: ignore[dict-item]
    config = TrainConfig.from_dict(values)
    task = find_task("distillation")(config)
    list(task.prepare(tmp_path / "data"))
    data = task.open_data(tmp_path / "data")
    student = task.build_model(data).train()
    batch = next(batch for batch in iter(data.loader.next_batch, None) if (batch.targets_BT == -100).any())
    teacher = load_model(taught).module
    with torch.no_grad():
        loss = task.loss(task.forward(student, batch), batch)
        scores, wanted = (
            model(batch.tokens_BT, documents_BT=batch.documents_BT)[batch.targets_BT != -100]
            for model in (student, teacher)
        )
    hard = F.cross_entropy(scores.double(), batch.targets_BT[batch.targets_BT != -100], reduction="sum")
    expected = hintons_loss(scores, wanted, hard, temperature=3.0, hard_share=0.25)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    events = list(train(config))
    assert events[-1].kind == "model_saved"


def test_a_network_of_images_learns_from_one_of_another_architecture(tmp_path: Path) -> None:
    for number, name in enumerate(test_image_classification.CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for image in range(4):
            shade = np.full((9, 11, 3), 80 * number + image, dtype=np.uint8)
            Image.fromarray(shade).save(tmp_path / "images" / name / f"{image}.png")
    wider = {"init_settings": test_image_classification.TINY | {"width": 8}}
    list(train(test_image_classification.configure(tmp_path / "images", tmp_path / "teacher", **wider)))
    taught = str(tmp_path / "teacher" / "model")
    changes: dict[str, Any] = {
        "init": "mobilenet_v3_small",
        "init_settings": {"width_multiple": 0.25},
        "task": {"kind": "distillation", "teacher": taught, "of": "image_classification", "hard_share": 0.25},
    }
    config = test_image_classification.configure(tmp_path / "images", tmp_path / "student", **changes)
    task = find_task("distillation")(config)
    data = task.open_data(tmp_path)
    student = task.build_model(data).train()
    batch = data.loader.next_batch()
    torch.manual_seed(1)  # for the dropout
    with torch.no_grad():
        loss = task.loss(task.forward(student, batch), batch)
        torch.manual_seed(1)
        scores, wanted = (model(*task.inputs(batch)) for model in (student, load_model(taught).module))
    hard = -(batch.targets_BK.double() * scores.double().log_softmax(-1)).sum()
    expected = hintons_loss(scores, wanted, hard, temperature=2.0, hard_share=0.25)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    assert list(train(config))[-1].kind == "model_saved"
    with pytest.raises(ConfigError, match=r"sees images with data\.mean=.* and the student with \[0\.5, 0\.5, 0\.5\]"):
        list(train(config.override({"data.mean": [0.5, 0.5, 0.5], "folder": str(tmp_path / "other")})))


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
