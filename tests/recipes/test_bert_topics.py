"""Files that look like the Brown corpus become texts and passages with topics, which the recipe learns from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek.core.errors import DataError
from deepseek.models.loading import load_model
from deepseek.recipes import load_recipe
from deepseek.recipes.bert_topics import compose_data, measure_baselines
from deepseek.train import train

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = {"a": "mayor vote city", "k": "she laughed softly"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Sixteen texts of two genres with words of their own, and one of a genre without a topic."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "README").write_text("no text of the corpus")
    (folder / "cb01").write_text("\n\tOpinions/nns and/or/cc-tl reviews/nns ./.\n")
    for genre, words in WORDS.items():
        line = "\t" + " ".join(f"{word}/nn" for word in words.split()) + " ./.\n\n"
        for number in range(1, 9):
            (folder / f"c{genre}{number:02d}").write_text(line * 4)
    return folder


def read(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_tags_go_and_every_eighth_text_is_held_out_whole(package: Path, tmp_path: Path) -> None:
    compose_data(package, tmp_path / "brown")
    assert (tmp_path / "brown/text/train/ca01.txt").read_text() == "\n".join(["mayor vote city ."] * 4)
    assert "/" not in (tmp_path / "brown/text/train/cb01.txt").read_text().replace("and/or", "")
    for part, numbers in (("train", range(1, 8)), ("heldout", [8])):
        names = {f"c{genre}{number:02d}" for genre in WORDS for number in numbers}
        assert {path.stem for path in (tmp_path / "brown/topics" / part).iterdir()} == names
        texts = {path.stem for path in (tmp_path / "brown/text" / part).iterdir()}
        assert texts - {"cb01"} == names


def test_a_passage_has_three_lines_and_the_topic_of_its_genre(package: Path, tmp_path: Path) -> None:
    compose_data(package, tmp_path / "brown")
    rows = read(tmp_path / "brown/topics/heldout")
    lines = ["mayor vote city ."] * 4 + ["she laughed softly ."] * 4
    assert [row["text"] for row in rows] == [" ".join(lines[:3]), lines[3], " ".join(lines[4:7]), lines[7]]
    assert [row["label"] for row in rows] == ["news", "news", "fiction", "fiction"]


def test_words_of_their_own_tell_topics_apart_and_the_largest_topic_is_right_for_half(
    package: Path, tmp_path: Path
) -> None:
    compose_data(package, tmp_path / "brown")
    scores = measure_baselines(tmp_path / "brown/topics")
    assert scores["words"]["accuracy"] == 1.0
    assert scores["largest_topic"]["accuracy"] == 0.5


def test_a_folder_without_the_corpus_is_one_sentence_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text of the Brown corpus"):
        compose_data(tmp_path, tmp_path / "brown")
    assert not (tmp_path / "brown").exists()


def test_the_recipe_learns_from_what_was_composed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compose_data(package)
    changes = {"init": "bert-base", "init_settings": TINY, "data.vocab_size": 50, "data.batch_size": 8, "num_steps": 30}
    config = load_recipe("bert_topics").override(
        changes
        | {"optimizer.base_learning_rate": 0.6, "optimizer.warmup_steps": 2, "evaluate_every": 0, "precision": "fp32"}
    )
    (evaluated,) = (event for event in train(config) if event.kind == "evaluated")
    assert evaluated.metrics["accuracy"] == 1.0
    (answer,) = load_model("runs/bert_topics/model").classify("she laughed softly .")
    assert answer[0][0] == "fiction"
