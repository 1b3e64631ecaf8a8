"""The digits are learned within seconds, and the artifact reads them."""

from __future__ import annotations

from pathlib import Path

from deepseek.models.loading import load_model
from deepseek.recipes import load_recipe
from deepseek.train.events import Evaluated
from deepseek.train.loop import train

FAST = {"data.batch_size": 32, "optimizer.base_learning_rate": 1.0, "optimizer.warmup_steps": 5}


def test_a_few_steps_read_most_digits_and_predict_names_them(tmp_path: Path) -> None:
    changes = {"folder": str(tmp_path), "init_settings": {"depths": [1, 1], "width": 16, "stem": "cifar"}}
    config = load_recipe("resnet_digits").override(changes | {"num_steps": 60, "evaluate_every": 0} | FAST)
    (evaluated,) = (event for event in train(config) if isinstance(event, Evaluated))
    assert evaluated.num_units == 365
    assert evaluated.metrics["accuracy"] > 0.5
    paths = sorted((tmp_path / "data" / "digits" / "0").glob("*.png"))[:20]
    best = [answer[0][0] for answer in load_model(tmp_path / "model").classify(paths)]
    assert best.count("0") > 12
