"""The recipe learns to answer from questions that are composed from code."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.models.loading import load_model
from deepseek.recipes import load_recipe
from deepseek.recipes.stdlib_questions import compose_questions
from deepseek.train import train
from tests.recipes.test_stdlib_questions import write_modules

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}


def test_composed_questions_are_learned_from_and_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_modules(tmp_path / "code", 40)
    for path in folder.glob("*.py"):
        path.write_text(path.read_text() + f'def last_{path.stem}(x):\n    "Do the last thing of {path.stem}."\n')
    compose_questions(Path("questions"), sources=("code",))
    changes = {
        "init": "bert-base",
        "init_settings": TINY,
        "data.vocab_size": 120,
        "num_steps": 3,
        "evaluate_every": 0,
        "precision": "fp32",
    }
    events = list(train(load_recipe("bert_answers").override(changes)))
    (evaluated,) = (event for event in events if event.kind == "evaluated")
    assert evaluated.num_units > 0
    assert 0 <= evaluated.metrics["exact_match"] <= evaluated.metrics["f1"] <= 1
    context = "load(path): Load a record from disk."
    assert load_model("runs/bert_answers/model").answer("What does load do?", context).text in context


def test_the_recipe_begins_where_the_small_bert_ends() -> None:
    assert load_recipe("bert_answers").init == f"{load_recipe('bert_small').folder}/model"
