"""The loss is that of transformers with positions, answers come from all windows, and scores are those of SQuAD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.core.errors import ConfigError, DataError
from deepseek.data.answer_windows import NO_ANSWER, ContextQuestion
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.tasks.question_answering import AnswerScores, normalize, overlap
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
FILLERS = ["the", "old", "house", "by", "river", "has", "small", "garden", "near", "water", "birds", "day"]


def draw_rows(num: int = 40, num_fillers: int = 30) -> list[dict[str, Any]]:
    """Contexts with "key is WORD" somewhere, which the question asks for."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        key, answer = f"key{random.integers(5)}", f"word{random.integers(30)}"
        fillers = [str(word) for word in random.choice(FILLERS, size=num_fillers)]
        place = int(random.integers(num_fillers))
        context = " ".join([*fillers[:place], key, "is", answer, *fillers[place:]])
        answers = {"text": [answer], "answer_start": [context.index(f"is {answer}") + 3]}
        rows.append({"question": f"what is {key}", "context": context, "answers": answers})
    return rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", draw_rows())


def make(folder: Path, table: str, task: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    data = {"sources": table, "batch_size": 6, "max_len": 32, "heldout_fraction": 0.3}
    return configure(folder, {"kind": "question_answering", "stride": 8} | (task or {}), data, **changes)


def test_the_loss_is_that_of_transformers(table: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, table))
    for _ in range(3):
        batch = data.loader.next_batch()
        starts, ends = batch.targets_B2.unbind(1)
        expected = model.model(**batch.inputs, start_positions=starts, end_positions=ends).loss
        loss = task.loss(task.forward(model, batch), batch) / task.count_units(batch)
        torch.testing.assert_close(loss, expected)
        assert task.count_units(batch) == 6


def test_long_contexts_become_windows_that_are_trained_on_each(table: str, tmp_path: Path) -> None:
    task, data, _ = open_task(make(tmp_path, table))
    windows = data.loader.source.samples
    assert data.num_train_units == len(windows) > len(task.rows[0])
    targets = [window.target for window in windows]
    assert NO_ANSWER in targets
    num_found = {window.question for window in windows if window.target != NO_ANSWER}
    assert len(num_found) == len(task.rows[0])


def test_a_window_in_a_batch_has_the_scores_that_it_has_alone(table: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, table))
    samples = data.loader.source.samples[:5]
    assert len({len(sample.text.tokens_T) for sample in samples}) > 1
    together = task.forward(model, task.collate(samples))
    for row, sample in enumerate(samples):
        alone = task.forward(model, task.collate([sample]))
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(all_of_them[row, : one.shape[1]], one[0], rtol=1e-4, atol=1e-6)


def test_micro_batches_of_unequal_size_add_up(table: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, table, optimizer=SGD))
    samples = sorted(data.loader.source.samples, key=lambda sample: len(sample.text.tokens_T))
    # The softmax is over the tokens of a batch's longest row, padding included, as in transformers.
    assert_accumulation_is_one_batch(task, model, samples[-5:])


def test_a_stopped_run_becomes_bit_equal_with_dropout_too(table: str, tmp_path: Path) -> None:
    assert_resume_is_bit_equal(lambda name: make(tmp_path / name, table, init_settings=SHAPE))


def test_an_oracle_scores_all_and_its_best_window_wins(table: str, tmp_path: Path) -> None:
    task, data, _ = open_task(make(tmp_path, table))
    measured = task.new_metrics()
    for batch in data.heldout():
        scores = []
        for column in (0, 1):
            scores_BT = torch.full(batch.inputs["input_ids"].shape, -5.0)
            for row, target in enumerate(batch.targets_B2[:, column].tolist()):
                scores_BT[row, target] = 5.0
            scores.append(scores_BT)
        measured.update((scores[0], scores[1]), batch)
    found = measured.compute()
    assert found["exact_match"] == found["f1"] == 1.0
    assert found["exact_match_low"] < 1.0


def test_a_question_without_an_answer_may_be_left_open(tmp_path: Path) -> None:
    rows = draw_rows()
    for row in rows[::3]:
        row["answers"] = {"text": [], "answer_start": []}
    table = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.warns(UserWarning, match=r"left out: rows\.jsonl:\d+ has no answer .*set task\.no_answer=true"):
        open_task(make(tmp_path / "closed", table).override({"data.heldout_fraction": 0}))
    task, data, _ = open_task(make(tmp_path / "open", table, {"no_answer": True}))
    without = {number for number, question in enumerate(task.heldout) if not question.answers}
    assert without
    assert all(
        window.target == NO_ANSWER for batch in data.heldout() for window in batch.samples if window.question in without
    )
    measured = task.new_metrics()
    for batch in data.heldout():
        starts = torch.zeros(batch.inputs["input_ids"].shape)
        starts[:, 0] = torch.tensor([9.0 if window.question in without else -9.0 for window in batch.samples])
        measured.update((starts, torch.zeros_like(starts)), batch)
    assert {number for number in range(len(task.heldout)) if measured.answer(number) == ""} == without


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0),
        ("in Paris, France", "Paris", 0.5),
        ("a big red dog", "the red big cat", 2 / 3),
        ("red red dog", "red cat", 0.4),
        ("London", "Paris", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("Paris", "", 0.0),
    ],
)
def test_the_overlap_is_squads(found: str, wanted: str, expected: float) -> None:
    # Worked out by hand: words without articles, 2 x shared / (found + wanted).
    assert overlap(found, wanted) == pytest.approx(expected)
    assert (normalize(found) == normalize(wanted)) == (expected == 1.0)


def test_the_best_of_several_right_answers_counts() -> None:
    questions = [ContextQuestion("q", "who", "a small red dog", (("dog", 12), ("small red dog", 2)))]
    scores = AnswerScores(questions, 5, no_answer=False)
    scores._none[0] = 0.0
    assert scores.answer(0) == ""
    assert scores.compute()["f1"] == 0.0


def test_training_finds_answers(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.jsonl", draw_rows(120, 6))
    optimizer = {"warmup_steps": 0, "base_learning_rate": 0.4}
    config = make(tmp_path / "run", table, num_steps=100, optimizer=optimizer).override({"task.stride": 0})
    metrics = [event for event in train(config) if event.kind == "evaluated"][-1].metrics
    assert metrics["f1"] > 0.6
    assert metrics["f1_low"] <= metrics["f1"] <= metrics["f1_high"]


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        ({"answers": "answer"}, {}, "column 'answer'; did you mean 'answers'"),
        ({"stride": 40}, {}, "no room for a question beside stride=40"),
        ({}, {"data.max_len": 100}, "rows may have 100 tokens and the model of init=bert-base takes 64"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    settings: dict[str, Any], changes: dict[str, Any], expected: str, table: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=expected):
        open_task(make(tmp_path, table, settings).override(changes))


def test_an_answer_that_the_context_does_not_have_there_is_left_out_by_name(tmp_path: Path) -> None:
    rows = draw_rows()
    rows[3]["answers"] = {"text": ["nowhere"], "answer_start": [4]}
    table = write_rows(tmp_path / "rows.jsonl", rows)
    config = make(tmp_path / "run", table).override({"data.heldout_fraction": 0})
    with pytest.warns(
        UserWarning, match=r"rows\.jsonl:3 has the answer 'nowhere' at character 4, where its context has"
    ):
        open_task(config)
