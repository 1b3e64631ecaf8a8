"""The loss is that of transformers with labels, classes keep their names, and bad rows are told from bad labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.core.errors import ConfigError, DataError
from deepseek.data.table_rows import TableRow
from deepseek.models.loading import load_model
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from tests.train.tiny_texts import (
    SGD,
    SHAPE,
    assert_accumulation_is_one_batch,
    assert_resume_is_bit_equal,
    configure,
    open_task,
    write_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore:the texts yield")
TOPICS = {"animals": ["dog", "cat", "bird", "barks", "sings"], "places": ["house", "river", "garden", "water", "old"]}


def draw_rows(num: int = 60) -> list[dict[str, Any]]:
    """Texts of one topic each, with the topic, its number, and the length of the text."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        topic = str(random.choice(list(TOPICS)))
        words = [str(word) for word in random.choice(TOPICS[topic], size=random.integers(2, 9))]
        pair = " ".join(str(word) for word in random.choice(TOPICS["places"], size=3))
        number = list(TOPICS).index(topic)
        rows.append({"text": " ".join(words), "pair": pair, "label": topic, "number": number, "length": len(words)})
    return rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", draw_rows())


def make(folder: Path, table: str, task: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    data = {"sources": table, "batch_size": 4, "max_len": 24, "heldout_fraction": 0.3}
    return configure(folder, {"kind": "sequence_classification"} | (task or {}), data, **changes)


@pytest.mark.parametrize(
    "settings",
    [{}, {"text_pair": "pair"}, {"label": "number"}, {"label": "length", "is_regression": True}],
    ids=["names", "pairs", "numbers", "regression"],
)
def test_the_loss_is_that_of_transformers(settings: dict[str, Any], table: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, table, settings))
    batch = data.loader.next_batch()
    expected = model.model(**batch.inputs, labels=batch.labels_B).loss
    loss = task.loss(task.forward(model, batch), batch) / task.count_units(batch)
    torch.testing.assert_close(loss, expected)
    assert task.count_units(batch) == 4
    assert ("token_type_ids" in batch.inputs) == ("text_pair" in settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("animals", "places")),
        ({"label": "number"}, ("0", "1")),
        ({"labels": ["places", "animals", "people"]}, ("places", "animals", "people")),
    ],
)
def test_classes_are_sorted_or_as_listed_and_go_into_the_model(
    settings: dict[str, Any], expected: tuple[str, ...], table: str, tmp_path: Path
) -> None:
    task, data, model = open_task(make(tmp_path, table, settings))
    assert task.labels == expected
    assert model.config["id2label"] == {str(number): name for number, name in enumerate(expected)}
    by_row = {tuple(sample.text.tokens_T.tolist()): sample.label for sample in data.loader.source.samples}
    for row in draw_rows():
        tokens = tuple(data.tokenizer.encode(row["text"], add_special_tokens=True))
        if tokens in by_row:
            assert expected[int(by_row[tokens])] == str(row[settings.get("label", "label")])


def test_labels_that_are_names_and_numbers_are_told(tmp_path: Path) -> None:
    rows = [*draw_rows(20), *[row | {"label": row["number"]} for row in draw_rows(20)]]
    with pytest.warns(UserWarning, match="has names, such as '(animals|places)', and numbers, such as (0|1), each of"):
        task, _, _ = open_task(make(tmp_path, write_rows(tmp_path / "rows.jsonl", rows)))
    assert task.labels == ("0", "1", "animals", "places")


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number} for number in (10, 9, -1, 10, 9, -1, 2)]
    task, _, _ = open_task(
        make(tmp_path, write_rows(tmp_path / "rows.jsonl", rows)).override({"data.heldout_fraction": 0})
    )
    assert task.labels == ("-1", "2", "9", "10")


def test_a_text_in_a_batch_has_the_scores_that_it_has_alone(table: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, table, {"text_pair": "pair"}))
    samples = data.loader.source.samples[:5]
    assert len({len(sample.text.tokens_T) for sample in samples}) > 1
    together = task.forward(model, task.collate(samples))
    alone = torch.cat([task.forward(model, task.collate([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"label": "length", "is_regression": True}])
def test_micro_batches_of_unequal_size_add_up(settings: dict[str, Any], table: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, table, settings, optimizer=SGD))
    assert_accumulation_is_one_batch(task, model, data.loader.source.samples[:5])


def test_a_stopped_run_becomes_bit_equal_with_dropout_too(table: str, tmp_path: Path) -> None:
    assert_resume_is_bit_equal(lambda name: make(tmp_path / name, table, init_settings=SHAPE))


def test_a_trained_model_names_its_classes_and_measures_itself(table: str, tmp_path: Path) -> None:
    optimizer = {"warmup_steps": 0, "base_learning_rate": 0.5}
    events = list(train(make(tmp_path / "run", table, num_steps=40, optimizer=optimizer)))
    metrics = next(event for event in events if event.kind == "evaluated").metrics
    assert metrics["accuracy"] == 1.0
    assert {"accuracy_low", "macro_f1", "macro_f1_high", "matthews"} < set(metrics)
    model = load_model(tmp_path / "run" / "model")
    (found,) = model.classify("a dog barks")
    assert found[0][0] == "animals"
    # A second run from this model, with its classes in another order, keeps the model's.
    rows = [row | {"label": {"animals": "places", "places": "animals"}[row["label"]]} for row in draw_rows()]
    other = write_rows(tmp_path / "rows.jsonl", rows)
    task, _, again = open_task(make(tmp_path / "more", other, init=str(tmp_path / "run" / "model"), init_settings={}))
    assert task.labels == ("animals", "places")
    assert torch.equal(again.model.classifier.weight, model.module.model.classifier.weight)


def test_a_regression_measures_correlations(table: str, tmp_path: Path) -> None:
    optimizer = {"warmup_steps": 0, "base_learning_rate": 0.2}
    settings = {"label": "length", "is_regression": True}
    config = make(tmp_path, table, settings, num_steps=60, optimizer=optimizer)
    metrics = [event for event in train(config) if event.kind == "evaluated"][-1].metrics
    assert metrics["pearson"] > 0.5
    assert metrics["spearman_low"] < metrics["spearman"] < metrics["spearman_high"]
    model = load_model(tmp_path / "model")
    few, many = model.estimate(["dog cat", "dog cat house house river river old water"])
    assert few < many
    with pytest.raises(ConfigError, match="knows no classes; call estimate"):
        model.classify("dog")


@pytest.mark.parametrize("settings", [{"label": "label"}, {"label": "length", "is_regression": True}])
@pytest.mark.parametrize("adapter", [None, {"rank": 2, "targets": ["query"]}])
def test_a_model_of_pairs_is_asked_with_pairs_as_in_training(
    settings: dict[str, Any], adapter: dict[str, Any] | None, table: str, tmp_path: Path
) -> None:
    settings = settings | {"text_pair": "pair"}
    changes: dict[str, Any] = {}
    if adapter is not None:
        list(train(make(tmp_path / "base", table, settings, num_steps=1)))
        changes = {"init": str(tmp_path / "base"), "init_settings": {}, "adapter": adapter}
    config = make(tmp_path / "run", table, settings, num_steps=1, **changes)
    list(train(config))
    loaded = load_model(tmp_path / "run" / "model")
    task, data, _ = open_task(config)
    model = load_model(tmp_path / "run" / "model").module
    rows = draw_rows(8)
    read = [TableRow(f"row {number}", row) for number, row in enumerate(rows)]
    expected = task.forward(model, task.collate(task.encode(read, data.tokenizer, is_heldout=True))).detach()
    texts, pairs = [row["text"] for row in rows], [row["pair"] for row in rows]
    if "is_regression" in settings:
        assert loaded.estimate(texts, pairs) == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    else:
        found = [dict(classes)["animals"] for classes in loaded.classify(texts, pairs)]
        assert found == pytest.approx(expected.softmax(1)[:, 0].tolist(), abs=1e-5)
    with pytest.raises(ConfigError, match="was trained on pairs of texts, and single ones were given"):
        (loaded.estimate if "is_regression" in settings else loaded.classify)(texts)


def test_a_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    rows = [*draw_rows(), {"text": "somewhere else", "label": "people"}]
    table = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:60 has the label 'people', and the classes are animals, places"):
        open_task(make(tmp_path / "run", table, {"labels": ["animals", "places"]}))
    held = write_rows(tmp_path / "held.jsonl", rows)
    config = make(tmp_path / "run", write_rows(tmp_path / "rows.jsonl", draw_rows()))
    with pytest.raises(DataError, match=r"held\.jsonl:60 has the label 'people'"):
        open_task(config.override({"data.heldout_sources": held}))
    assert not (tmp_path / "run" / "model").exists()


def test_rows_without_text_or_label_are_left_out_by_name(tmp_path: Path) -> None:
    broken = [{"text": "", "label": "animals"}, {"text": "dog", "label": None}, {"text": 3, "label": "places"}]
    broken += [{"text": "dog", "label": number} for number in (float("inf"), float("nan"), 0.5)]
    table = write_rows(tmp_path / "rows.jsonl", [*draw_rows(20), *broken])
    config = make(tmp_path / "run", table).override({"data.heldout_fraction": 0})
    with pytest.warns(
        UserWarning, match=r"left out: rows\.jsonl:20 has an empty text.*:21 has None in 'label'.*:22 has a"
    ):
        task, data, _ = open_task(config)
    assert data.num_train_units == 20
    with pytest.raises(DataError, match="6 rows cannot be used and 2 may be left out"):
        open_task(config.override({"data.max_broken": 2}))
    assert task.labels == ("animals", "places")


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        ({"label": "lable"}, {}, "column 'lable'; did you mean 'label'"),
        ({"text_pair": "pear"}, {}, "column 'pear'; did you mean 'pair'"),
        ({"label": "label", "is_regression": True}, {}, "expected a finite number"),
        ({"label": "pair", "labels": ["x"]}, {}, "the classes are x"),
        ({"labels": ["animals", "places", "animals"]}, {}, "task.labels lists animals twice"),
        ({}, {"data.batch_size": 500}, "lower batch_size"),
        ({}, {"data.max_len": 100}, "rows may have 100 tokens and the model of init=bert-base takes 64"),
        ({}, {"data.kind": "text"}, "learns from data of the kind table and data.kind is text"),
        ({}, {"init": "resnet18", "init_settings": {}}, "trains one for sequence_classification"),
        ({}, {"init": None, "init_settings": {}}, "begins with a model, and init is not given"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    settings: dict[str, Any], changes: dict[str, Any], expected: str, table: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=expected):
        open_task(make(tmp_path, table, settings).override(changes))


def test_one_class_is_too_few(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.jsonl", [row for row in draw_rows() if row["label"] == "places"])
    with pytest.raises(DataError, match="all texts have the label places; expected two classes or more"):
        open_task(make(tmp_path / "run", table))
