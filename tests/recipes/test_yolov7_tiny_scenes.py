"""The recipe learns from scenes that its own function composes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from deepseek.models.loading import load_model
from deepseek.recipes import load_recipe, yolov7_tiny_scenes
from deepseek.train import train


def test_scenes_are_composed_and_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(yolov7_tiny_scenes, "NUM_TRAIN", 8)
    monkeypatch.setattr(yolov7_tiny_scenes, "NUM_HELDOUT", 2)
    for name, color in (("blue", (0, 0, 255, 255)), ("red", (255, 0, 0, 255))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGBA", (20, 20), color).save(tmp_path / "pictures" / name / "square.png")
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (60, 60), (40, 60, 40)).save(tmp_path / "photographs" / "dark.png")
    yolov7_tiny_scenes.compose_data(Path("pictures"), Path("photographs"))
    changes = {"num_steps": 1, "init_settings": {"width_multiple": 0.125}, "data.batch_size": 4, "data.image_size": 64}
    events = list(train(load_recipe("yolov7_tiny_scenes").override(changes)))
    assert next(event.num_train_units for event in events if event.kind == "run_started") == 8
    assert next(event.num_units for event in events if event.kind == "evaluated") == 2
    assert load_model("runs/yolov7_tiny_scenes/model").module.config.labels == ("blue", "red")
