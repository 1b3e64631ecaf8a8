"""The loss is InfoNCE over the batch, retrieval that of brute force, and the artifact pools as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from deepseek.artifact.reading import open_artifact
from deepseek.core.errors import ConfigError, DataError
from deepseek.data.text_collate import TextBatch
from deepseek.models.loading import load_model
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.tasks.sentence_embedding import RetrievalScores, SentenceEmbedding, TextPairs
from tests.train.tiny_texts import SHAPE, assert_resume_is_bit_equal, configure, open_task, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:the texts yield")
ANIMALS = ["dog", "cat", "bird", "fish", "horse", "cow", "goat", "duck", "frog", "bee"]
PLACES = ["river", "house", "garden", "tree", "field", "barn", "lake", "hill", "road", "wood"]


def draw_rows(num: int = 60) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        animal, place = (str(random.choice(words)) for words in (ANIMALS, PLACES))
        text = f"a {animal} is in the {place}"
        rows.append({"text": text, "text_pair": f"{place} with {animal}", "score": float(random.random())})
    return rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", draw_rows())


def make(folder: Path, table: str, task: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    data = {"sources": table, "batch_size": 6, "max_len": 24, "heldout_fraction": 0.3}
    return configure(folder, {"kind": "sentence_embedding"} | (task or {}), data, **changes)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_loss_is_a_plain_cross_entropy_of_cosines(
    pooling: str, symmetric: bool, table: str, tmp_path: Path
) -> None:
    settings = {"pooling": pooling, "symmetric": symmetric, "temperature": 0.1}
    task, data, model = open_task(make(tmp_path, table, settings))
    batch = data.loader.next_batch()
    sides = []
    for texts in (batch.inputs, batch.right.inputs):
        hidden = model.model(**texts).last_hidden_state
        mask = texts.get("attention_mask", torch.ones_like(texts["input_ids"]))[..., None].float()
        sides.append(hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1))
    cosines = F.cosine_similarity(sides[0][:, None], sides[1][None], dim=-1) / 0.1
    expected = F.cross_entropy(cosines, torch.arange(6), reduction="sum")
    if symmetric:
        expected = (expected + F.cross_entropy(cosines.T, torch.arange(6), reduction="sum")) / 2
    torch.testing.assert_close(task.loss(task.forward(model, batch), batch), expected, rtol=1e-4, atol=1e-4)
    assert task.count_units(batch) == 6


def pairs(left_ids: list[int], right_ids: list[int], scores: list[float] | None = None) -> TextPairs:
    num = len(left_ids)
    empty = {"input_ids": torch.zeros(num, 1, dtype=torch.int64)}
    wanted = torch.tensor(scores or [float("nan")] * num, dtype=torch.float64)
    positive = torch.ones(num, dtype=torch.bool)
    return TextPairs(empty, TextBatch(empty), wanted, positive, torch.tensor(left_ids), torch.tensor(right_ids))


def test_a_text_that_comes_twice_is_no_negative_of_its_pair(table: str, tmp_path: Path) -> None:
    task = SentenceEmbedding(make(tmp_path, table, {"symmetric": False, "temperature": 1.0}))
    torch.manual_seed(0)
    left, right = F.normalize(torch.randn(2, 3, 5), dim=-1)
    loss = task.loss((left, right), pairs([1, 2, 1], [4, 5, 5]))
    cosines = (left @ right.T).exp()
    # Texts 0 and 2 are alike, and so are pairs 1 and 2.
    kept = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    expected = -(cosines.diag() / (cosines * kept).sum(1)).log().sum()
    torch.testing.assert_close(loss, expected)


def test_retrieval_and_order_are_those_of_brute_force() -> None:
    torch.manual_seed(0)
    left, right = F.normalize(torch.randn(2, 40, 6), dim=-1)
    right[:20] = left[:20]
    wanted = [float(score) for score in torch.rand(40)]
    scores = RetrievalScores()
    for begin in (0, 16, 32):
        end = min(40, begin + 16)
        numbers = list(range(begin, end))
        scores.update((left[begin:end], right[begin:end]), pairs(numbers, numbers, wanted[begin:end]))
    found = scores.compute()
    nearest = [max(range(40), key=lambda other: float(left[row] @ right[other])) for row in range(40)]
    assert found["retrieval_accuracy"] == sum(row == other for row, other in enumerate(nearest)) / 40
    expected = stats.spearmanr((left * right).sum(1).numpy(), wanted).statistic
    assert found["spearman"] == pytest.approx(expected, abs=1e-6)


def test_vectors_that_are_all_alike_retrieve_nothing() -> None:
    scores = RetrievalScores()
    alike = torch.ones(10, 2) / 2**0.5
    scores.update((alike, alike), pairs(list(range(10)), list(range(10))))
    assert scores.compute()["retrieval_accuracy"] == 0.1


def test_only_pairs_over_the_bound_are_trained_on_and_all_are_measured(table: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, table, {"score": "score", "min_score": 0.5}))
    assert all(sample.score >= 0.5 for sample in data.loader.source.samples)
    kept = [batch.is_positive_B for batch in data.heldout()]
    assert 0 < int(torch.cat(kept).sum()) < len(torch.cat(kept))
    batch = next(iter(data.heldout()))
    assert task.count_units(batch) == int((batch.scores_B >= 0.5).sum())
    assert torch.isfinite(task.loss(task.forward(model, batch), batch))


def test_a_stopped_run_becomes_bit_equal_with_dropout_too(table: str, tmp_path: Path) -> None:
    assert_resume_is_bit_equal(lambda name: make(tmp_path / name, table, init_settings=SHAPE))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_artifact_embeds_as_it_was_trained(pooling: str, table: str, tmp_path: Path) -> None:
    optimizer = {"warmup_steps": 0, "base_learning_rate": 0.4}
    config = make(tmp_path / "run", table, {"pooling": pooling}, num_steps=40, optimizer=optimizer)
    metrics = [event for event in train(config) if event.kind == "evaluated"][-1].metrics
    assert metrics["retrieval_accuracy"] > 0.3
    folder = tmp_path / "run" / "model"
    assert open_artifact(folder).has_file("1_Pooling/config.json")
    assert [module["path"] for module in json.loads((folder / "modules.json").read_text())] == ["", "1_Pooling"]
    model = load_model(folder)
    texts = [row["text"] for row in draw_rows(5)]
    task, _, again = open_task(make(tmp_path / "more", table, {"pooling": pooling}, init=str(folder), init_settings={}))
    rows = [{"text": text, "text_pair": text} for text in texts]
    table_of_them = write_rows(tmp_path / "few.jsonl", rows)
    _, data, _ = open_task(
        make(tmp_path / "few", table_of_them, init=str(folder), init_settings={}).override(
            {"data.heldout_fraction": 0, "data.batch_size": 1}
        )
    )
    vectors, _ = task.forward(again, task.collate(data.loader.source.samples))
    torch.testing.assert_close(model.embed(texts), vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"text_pair": "pair"}, "column 'pair'"),
        ({"score": "scores"}, "column 'scores'; did you mean 'score'"),
        ({"score": "score", "min_score": 2.0}, "none of the .* has a score of task.min_score=2.0 or more"),
        ({"score": "text"}, "expected a finite number"),
        ({"min_score": 1.0}, "task.score names no column"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    settings: dict[str, Any], expected: str, table: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=expected):
        open_task(make(tmp_path, table, settings))


def test_a_pair_without_its_second_text_is_left_out_by_name(tmp_path: Path) -> None:
    rows = [*draw_rows(20), {"text": "a dog", "text_pair": None}, {"text": "a cat", "text_pair": ["a", "b"]}]
    config = make(tmp_path / "run", write_rows(tmp_path / "rows.jsonl", rows)).override({"data.heldout_fraction": 0})
    with pytest.warns(UserWarning, match=r"rows\.jsonl:20 has nothing in 'text_pair'.*:21 has a list"):
        _, data, _ = open_task(config)
    assert data.num_train_units == 20
