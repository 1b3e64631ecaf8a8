"""A folder that looks like the npm package is learned from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepseek.core.errors import DataError
from deepseek.models.loading import load_model
from deepseek.recipes import load_recipe
from deepseek.train.loop import train


def test_the_package_is_read_by_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "package/img/google/64"
    pictures.mkdir(parents=True)
    rows = []
    for number in range(12):
        rows.append({"image": f"{number}.png", "category": ["Flags", "Food & Drink"][number % 2], "name": "x"})
        Image.fromarray(np.full((64, 64, 4), 20 * number, dtype=np.uint8)).save(pictures / f"{number}.png")
    (tmp_path / "package/emoji.json").write_text(json.dumps(rows))
    changes = {
        "data.batch_size": 4,
        "data.heldout_fraction": 0.3,
        "num_steps": 2,
        "init_settings": {"width_multiple": 0.25},
    }
    config = load_recipe("mobilenet_emoji").override(changes | {"data.num_workers": 0, "evaluate_every": 0})
    list(train(config))
    (answer,) = load_model("runs/mobilenet_emoji/model").classify(pictures / "3.png")
    assert sorted(label for label, _ in answer) == ["Flags", "Food & Drink"]


def test_without_the_package_a_sentence_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"source 'package/emoji\.json' does not exist"):
        list(train(load_recipe("mobilenet_emoji")))
