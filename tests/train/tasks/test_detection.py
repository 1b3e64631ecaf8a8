"""Training a detector: what it learns from, what is measured, and that a stopped run becomes the one that was not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.artifact.reading import read_manifest
from deepseek.checkpoint.restoring import newest_valid
from deepseek.core.errors import ConfigError, MissingExtraError
from deepseek.data.boxes import collate, open_boxes
from deepseek.data.images import read_image
from deepseek.models import zoo
from deepseek.models.loading import load_model, save_model
from deepseek.models.yolov7.model import TINY_ANCHORS, YOLOv7
from deepseek.train import TrainConfig, train
from deepseek.train.tasks.detection import Detection, RawBoxes, measure_sizes
from tests.data.coco_files import write_data, write_squares


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    write_squares(folder, 24)
    return folder


def configure(squares: Path, folder: Path, **changes: Any) -> TrainConfig:
    values = {
        "folder": str(folder),
        "task": {"kind": "detection", "anchors": "data"},
        "init": "yolov7-tiny",
        "init_settings": {"width_multiple": 0.125},
        "data": {
            "annotations": str(squares / "boxes.json"),
            "images": str(squares / "images"),
            "image_size": 64,
            "batch_size": 4,
            "num_workers": 0,
        },
        "optimizer": {"reference_batch_size": 4, "base_learning_rate": 2e-3, "warmup_steps": 0},
        "precision": "fp32",
        "num_steps": 4,
        "log_every": 1,
    }
    return TrainConfig.from_dict(values).override(changes)


def run(config: TrainConfig) -> list[Any]:
    return list(train(config))


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if event.kind == "step_done"]


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_model(Path(config.folder) / "model").module.state_dict()


def test_a_run_lowers_the_loss_and_ends_in_a_detector_that_names_its_objects(squares: Path, tmp_path: Path) -> None:
    changes = {"optimizer.base_learning_rate": 1e-2, "optimizer.grad_clip": 10.0}
    still = {f"data.augmentation.{name}": 0 for name in ("mosaic", "scale", "translate", "hue", "saturation")}
    config = configure(squares, tmp_path / "run", num_steps=25, **changes, **still)
    events = run(config)
    started = next(event for event in events if event.kind == "run_started")
    assert started.task == "detection" and started.unit == "images"
    measured = next(event for event in events if event.kind == "evaluated")
    assert set(measured.metrics) == {"map_50", "map_50_95"}
    steps = losses(events)
    assert sum(steps[-5:]) < 0.9 * sum(steps[:5])
    assert read_manifest(tmp_path / "run" / "model").metrics["map_50"] == measured.metrics["map_50"]
    model = load_model(tmp_path / "run" / "model")
    assert model.module.config.labels == ("cat", "dog", "owl") and model.module.config.image_size == 64
    (found,) = model.detect(squares / "images" / "000.png", min_score=0.0)
    assert len(found.labels) > 0 and set(found.labels) <= {"cat", "dog", "owl"}


def test_a_stopped_run_becomes_bit_equal_to_one_that_was_not(squares: Path, tmp_path: Path) -> None:
    changes = {"num_steps": 6, "ema_decay": 0.9, "checkpoint_every": 100}
    whole, stopped = (configure(squares, tmp_path / name, **changes) for name in ("whole", "stopped"))
    expected = run(whole)
    events = train(stopped)
    for event in events:
        if event.kind == "step_done" and event.step == 3:
            break
    events.close()
    assert newest_valid(tmp_path / "stopped" / "checkpoints").step == 3
    rest = run(stopped)
    assert losses(rest) == losses(expected)[3:]
    ours, theirs = weights(stopped), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last = [[event.all_metrics for event in found if event.kind == "evaluated"] for found in (rest, expected)]
    assert last[0] == last[1]


def test_micro_batches_add_up_to_the_batch_under_sgd(squares: Path, tmp_path: Path) -> None:
    """Without batch norms, whose statistics are those of a micro-batch."""
    changes = {
        "init_settings": {"width_multiple": 0.125, "is_folded": True},
        "optimizer.name": "sgd",
        "optimizer.base_learning_rate": 0.5,
        "optimizer.grad_clip": None,
        "optimizer.weight_decay": 0.0,
        "num_steps": 3,
    }
    whole = configure(squares, tmp_path / "whole", **changes)
    parts = configure(squares, tmp_path / "parts", **changes, **{"data.batch_size": 1, "accum_steps": 4})
    assert losses(run(parts)) == pytest.approx(losses(run(whole)), rel=1e-5)
    ours, theirs = weights(parts), weights(whole)
    task = Detection(whole)
    torch.manual_seed(whole.seed)
    before = task.build_model(task.open_data(tmp_path)).state_dict()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    assert max((theirs[name] - before[name]).abs().max().item() for name in theirs) > 1e-3


def test_crowds_are_neither_learned_nor_asked_for(tmp_path: Path) -> None:
    boxes = [(0, 1, 8, 8, 20, 20), (1, 1, 4, 4, 30, 30)]
    crowd = (0, 1, 30, 30, 20, 20, 1)
    results = []
    for name, more in (("with", [crowd]), ("without", [])):
        write_data(tmp_path / name, [(64, 64)] * 2, [*boxes, *more])
        config = configure(tmp_path / name, tmp_path / "run", **{"data.batch_size": 2, "data.heldout_fraction": 0})
        task = Detection(config)
        with pytest.warns(UserWarning, match="no training image has a box of dog, owl"):
            data = task.open_data(tmp_path)
        torch.manual_seed(0)
        model = task.build_model(data).eval()
        batch = collate([data.boxes.train.load(index, None) for index in range(2)])
        results.append(task.loss(task.forward(model, batch), batch).item())
        assert measure_sizes(data.boxes.train, 64).tolist() == [[20.0, 20.0], [30.0, 30.0]]
    assert results[0] == results[1]


def test_a_perfect_detector_measures_one_and_is_cut_off_at_the_picture(tmp_path: Path) -> None:
    """Its boxes reach into the grey margin, which the picture's edge cuts off."""
    write_data(tmp_path, [(64, 32)], [(0, 1, 0, 8, 32, 24)])
    config = configure(tmp_path, tmp_path / "run", **{"data.batch_size": 1, "data.heldout_fraction": 0})
    with pytest.warns(UserWarning, match="no training image has a box of"):
        source = open_boxes(config.data).train
    batch = collate([source.load(0, None)])
    assert batch.boxes_N4.tolist() == [[0.0, 24.0, 32.0, 48.0]]
    levels = [torch.full((1, 3, size, size, 8), -20.0) for size in (8, 4, 2)]
    # On stride 32, cell (0, 0): centre (16, 40) and size (64, 64) with an anchor of 64: (-16, 8) to (48, 72).
    levels[2][0, 0, 1, 0] = torch.tensor([0.0, -1.0986, 0.0, 0.0, 20.0, 20.0, -20.0, -20.0])
    grid = torch.tensor(TINY_ANCHORS)[:, None, :, None, None].clone()
    grid[2, 0, 0] = 64.0
    measured = Detection(config).new_metrics()
    assert measured is not None
    measured.update(RawBoxes(tuple(levels), grid), batch)
    # What is left: (0, 16) to (48, 48), of which the object is 32 x 24 of 48 x 32.
    assert measured.compute() == {"map_50": pytest.approx(1.0), "map_50_95": pytest.approx(0.1)}


def test_training_goes_on_from_a_detector_with_other_classes(squares: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = zoo.build("yolov7-tiny", width_multiple=0.125, num_classes=2, labels=("car", "bus"))
    save_model(before, tmp_path / "before")
    config = configure(squares, tmp_path / "run", init=str(tmp_path / "before"), init_settings={})
    config = config.override({"task.anchors": "model"})
    task = Detection(config)
    model = task.build_model(task.open_data(tmp_path))
    assert isinstance(model, YOLOv7)
    assert model.config.labels == ("cat", "dog", "owl") and model.config.anchors == TINY_ANCHORS
    assert torch.equal(model.state_dict()["model.76.conv.weight"], before.state_dict()["model.76.conv.weight"])
    assert task.start is not None and any(name.startswith("model.77.m.") for name in task.start.new_tensors)


def test_anchors_may_be_those_of_the_data(squares: Path, tmp_path: Path) -> None:
    task = Detection(configure(squares, tmp_path / "run"))
    model = task.build_model(task.open_data(tmp_path))
    assert isinstance(model, YOLOv7)
    sizes = [size for level in model.config.anchors for anchor in level for size in anchor]
    assert min(sizes) >= 64 / 4 and max(sizes) <= 64 / 2
    torch.testing.assert_close(model.head.anchor_grid.flatten(), torch.tensor(sizes))
    torch.testing.assert_close(model.head.anchors[1].flatten(), torch.tensor(sizes[6:12]) / 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": None, "init_settings": {}}, "init is not given"),
        ({"init": "resnet18", "init_settings": {}}, "trains one for detection"),
        ({"init_settings": {"width_multiple": 0.125, "in_channels": 1}}, "images have 3 channels and .* takes 1"),
        ({"data": {"kind": "text"}}, "data of the kind boxes and data.kind is text"),
    ],
)
def test_what_a_detector_cannot_learn_from_is_refused(
    squares: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = configure(squares, tmp_path / "run").to_dict() | changes
    with pytest.raises(ConfigError, match=message):
        run(TrainConfig.from_dict(values))
    assert not (tmp_path / "run" / "model").exists()


def test_a_missing_library_is_said_before_the_run_begins(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(MissingExtraError, match="pycocotools"):
        run(configure(squares, tmp_path / "run"))
    config = configure(squares, tmp_path / "run", **{"data.heldout_fraction": 0, "num_steps": 1})
    assert losses(run(config))  # nothing is measured, so that nothing is missing


def test_the_squares_of_the_tests_are_where_their_boxes_are(squares: Path, tmp_path: Path) -> None:
    source = open_boxes(configure(squares, tmp_path).data).train
    for image in source.images[:5]:
        pixels = read_image(image.path)
        for (left, top, right, bottom), label in zip(image.boxes, image.labels, strict=True):
            inside = pixels[:, int(top) : int(bottom), int(left) : int(right)]
            assert np.argmax(inside.mean((1, 2)).numpy()) == label or len(image.boxes) > 1
