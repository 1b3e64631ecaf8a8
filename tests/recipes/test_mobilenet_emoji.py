"""A folder that looks like the npm package is learned from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepseek.core.errors import DataError
from deepseek.data.sources import is_heldout
from deepseek.models.loading import load_model
from deepseek.recipes import load_recipe
from deepseek.recipes.mobilenet_emoji import measure_baselines
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


def test_a_linear_model_tells_red_from_blue_and_the_largest_class_is_right_for_its_share(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        is_flag = number % 3 == 0
        rows.append({"image": f"{number}.png", "label": "flags" if is_flag else "food"})
        color = (200 + number, 0, 0) if is_flag else (0, 0, 200 + number // 2)
        Image.new("RGB", (20, 20), color).save(tmp_path / f"{number}.png")
    (tmp_path / "table.json").write_text(json.dumps(rows))
    changes = {"data.sources": [str(tmp_path / "table.json")], "data.image_folder": None, "data.label_column": "label"}
    config = load_recipe("mobilenet_emoji").override(changes | {"data.heldout_fraction": 0.3})
    scores = measure_baselines(config)
    heldout = [row["label"] for row in rows if is_heldout(row["image"], 0.3)]
    assert scores["pixels"]["accuracy"] == 1.0
    assert scores["largest_class"]["accuracy"] == heldout.count("food") / len(heldout)
    with pytest.raises(DataError, match=r"raise data\.heldout_fraction"):
        measure_baselines(config.override({"data.heldout_fraction": 0}))
