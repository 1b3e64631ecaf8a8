"""Training is a plain loop in torch over the same images, however they are loaded; the artifact knows its classes."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from deepseek.artifact.reading import read_manifest
from deepseek.core.errors import ConfigError, DataError
from deepseek.data.augmentation import center
from deepseek.data.config import ImagesConfig
from deepseek.data.images import read_rgb
from deepseek.data.labelled_images import ImageBatch, open_images
from deepseek.models.loading import load_model
from deepseek.models.predictions import Predictor, prepare_images
from deepseek.train.config import TrainConfig
from deepseek.train.events import Evaluated, StepDone
from deepseek.train.loop import train
from deepseek.train.tasks.image_classification import Accuracy, ImageClassification

TINY = {"depths": [1, 1], "width": 4, "stem": "cifar"}
CLASSES = ("black", "grey", "white")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise that differ in brightness."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for image in range(8):
            pixels = random.integers(80 * number, 80 * number + 90, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")
    return folder


def configure(images: Path, folder: Path, **changes: Any) -> TrainConfig:
    values = {
        "folder": str(folder),
        "task": "image_classification",
        "init": "resnet18",
        "init_settings": TINY,
        "data": {"sources": str(images), "heldout_fraction": 0.25, "image_size": 8, "batch_size": 6, "num_workers": 0},
        "optimizer": {"name": "sgd", "base_learning_rate": 2.0, "schedule": "constant", "warmup_steps": 0},
        "num_steps": 6,
        "log_every": 1,
        "checkpoint_every": 3,
        "precision": "fp32",
    }
    values["optimizer"] |= {"weight_decay": 0.0, "momentum": 0.0, "grad_clip": None}
    return TrainConfig.from_dict(values).override(changes)


def finish(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Train, and return weights and statistics."""
    for _ in train(config):
        pass
    return load_model(Path(config.folder) / "model").module.state_dict()


def normalize(batch: ImageBatch) -> torch.Tensor:
    mean, deviation = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (batch.pixels_BCHW.contiguous() / 255 - mean) / deviation


def test_weights_and_statistics_are_those_of_a_plain_loop(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", **{"task.mixup": 0.5, "data.augmentation.brightness": 0.3})
    task = ImageClassification(config)
    data = task.open_data(tmp_path)
    torch.manual_seed(config.seed)
    model = task.build_model(data).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0 * 6 / 256)
    for _ in range(6):
        batch = data.loader.next_batch()
        optimizer.zero_grad()
        log_shares = model(normalize(batch)).log_softmax(1)
        (-(batch.targets_BK * log_shares).sum() / 6).backward()
        optimizer.step()
    found = finish(config)
    assert any("running_var" in name for name in found)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=2e-4, atol=2e-5, msg=name)


def test_micro_batches_without_batch_norm_learn_as_one_batch_does(images: Path, tmp_path: Path) -> None:
    settings = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_size": 8, "mlp_size": 16}
    changes = {"init": "vit_b_16", "init_settings": settings}
    whole = finish(configure(images, tmp_path / "whole", **changes))
    parts = finish(configure(images, tmp_path / "parts", **changes, **{"data.batch_size": 2, "accum_steps": 3}))
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_was_stopped_and_one_with_workers_end_bit_equal(
    images: Path, tmp_path: Path, num_workers: int
) -> None:
    changes = {"optimizer.name": "adamw", "ema_decay": 0.5, "task.mixup": 0.2}
    whole = finish(configure(images, tmp_path / "whole", **changes))
    config = configure(images, tmp_path / "stopped", **changes, **{"data.num_workers": num_workers})
    events = train(config)
    for event in events:
        if isinstance(event, StepDone) and event.step == 4:
            events.close()
    again = finish(config)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mobilenet_v3_small", {"width_multiple": 0.25}),
        ("vit_b_16", {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_size": 8, "mlp_size": 16}),
        ("resnet50", {"depths": [1, 1], "width": 4}),
    ],
)
def test_every_family_trains_and_names_its_classes(
    images: Path, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    config = configure(
        images, tmp_path, **{"init": name, "init_settings": settings, "data.image_size": 32, "num_steps": 1}
    )
    finish(config)
    model = load_model(tmp_path / "model")
    answers = model.classify([images / "white/0.png", images / "black/0.png"])
    assert [sorted(label for label, _ in answer) for answer in answers] == [list(CLASSES)] * 2


def test_the_artifact_predicts_as_the_evaluation_did(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path, **{"num_steps": 30, "data.augmentation.flip": 0.5, "evaluate_every": 15})
    evaluated = [event for event in train(config) if isinstance(event, Evaluated)]
    assert [event.step for event in evaluated] == [15, 30]
    metrics = evaluated[-1].metrics
    assert set(metrics) == {"accuracy", "accuracy_low", "accuracy_high"}
    source = open_images(config.data_of(ImagesConfig)).heldout
    assert source is not None
    model = load_model(tmp_path / "model")
    answers = model.classify([str(image.content) for image in source.images])
    right = [answer[0][0] == image.label for answer, image in zip(answers, source.images, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["accuracy"] > 0.9 and read_manifest(tmp_path / "model").metrics["accuracy"] == metrics["accuracy"]


def test_an_evaluation_sees_an_image_as_predict_does(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path, **{"data.crop_share": 0.8, "data.mean": [0.5, 0.4, 0.3], "num_steps": 1})
    finish(config)
    path = images / "grey/0.png"
    predictor = Predictor(load_model(tmp_path / "model").module, lambda x: x, None, tmp_path / "model")
    expected = prepare_images(predictor, [path])
    pixels = torch.from_numpy(center(read_rgb(path), 8, crop_share=0.8)).permute(2, 0, 1)[None]
    (found,) = ImageClassification(config).inputs(ImageBatch(pixels, torch.zeros(1, 3)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255 / 0.229)


def test_the_loss_of_an_evaluation_is_of_whole_labels(images: Path, tmp_path: Path) -> None:
    task = ImageClassification(configure(images, tmp_path))
    data = task.open_data(tmp_path)
    assert data.heldout is not None
    targets = torch.cat([batch.targets_BK for batch in data.heldout()])
    assert torch.equal(targets.sort(1).values, torch.tensor([0.0, 0.0, 1.0]).expand(len(targets), 3))
    smoothed = data.loader.next_batch()
    assert smoothed.targets_BK.max() == pytest.approx(0.9 + 0.1 / 3)
    logits = torch.randn(6, 3)
    expected = F.cross_entropy(logits, smoothed.targets_BK.argmax(1), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(task.loss(logits, smoothed), expected)
    assert task.count_units(smoothed) == 6


def test_accuracy_counts_images_and_one_of_five_only_with_more_classes() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(50, 9)).astype(np.float32), random.integers(0, 9, 50)
    accuracy = Accuracy()
    for part in np.split(np.arange(50), [20]):
        targets = F.one_hot(torch.from_numpy(labels[part]), 9).float()
        accuracy.update(torch.from_numpy(logits[part]), ImageBatch(torch.zeros(len(part), 3, 1, 1), targets))
    found = accuracy.compute()
    best = np.argsort(-logits, axis=1)
    assert found["accuracy"] == pytest.approx((best[:, 0] == labels).mean())
    assert found["top_5_accuracy"] == pytest.approx((best[:, :5] == labels[:, None]).any(1).mean())
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]


def test_answers_that_are_all_alike_are_not_right() -> None:
    accuracy = Accuracy()
    accuracy.update(torch.zeros(4, 6), ImageBatch(torch.zeros(4, 3, 1, 1), torch.eye(6)[:4]))
    assert (accuracy.compute()["accuracy"], accuracy.compute()["top_5_accuracy"]) == (0.0, 0.0)


def test_a_broken_image_in_the_middle_of_a_run_is_left_out_and_too_many_end_it(images: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    for name in CLASSES:
        (broken / name).mkdir(parents=True)
        for path in (images / name).iterdir():
            content = BytesIO()
            Image.open(path).resize((64, 64)).save(content, "JPEG")
            (broken / name / f"{path.stem}.jpg").write_bytes(content.getvalue())
    for number in range(2):
        path = broken / "grey" / f"{number}.jpg"
        path.write_bytes(path.read_bytes()[:-200])
    config = configure(broken, tmp_path / "run", **{"data.heldout_fraction": 0.0})
    with pytest.warns(
        UserWarning, match=r"left out: .*grey/[01]\.jpg cannot be read as an image \(image file is trunc"
    ):
        losses = [event.loss for event in train(config) if isinstance(event, StepDone)]
    assert len(losses) == 6 and np.isfinite(losses).all()
    strict = configure(broken, tmp_path / "strict", **{"data.heldout_fraction": 0.0, "data.max_broken": 1})
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"2 samples cannot be loaded and 1 may be left out; the last one: .*grey"),
    ):
        list(train(strict))
    assert not (tmp_path / "strict" / "model").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.batch_size": 64}, DataError, "samples and a batch takes 64; lower batch_size or add samples"),
        ({"data.classes": ["black", "white"]}, DataError, "has the label 'grey', and the classes are black, white"),
        ({"init": None, "init_settings": {}}, ConfigError, "begins with a model, and init is not given"),
        ({"init_settings": TINY | {"in_channels": 1}}, ConfigError, "images have 3 channels"),
        (
            {"init": "yolov7", "init_settings": {}, "data.image_size": 32},
            ConfigError,
            "trains one for image_classification",
        ),
        ({"data.kind": "text"}, ConfigError, "learns from data of the kind images and data.kind is text"),
        ({"data.sources": "absent"}, DataError, "'absent' does not exist; give a folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_learned(
    images: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(train(configure(images, tmp_path, **changes)))
    assert not (tmp_path / "model").exists() and not (tmp_path / "checkpoints").exists()


def test_an_artifact_begins_another_run_with_a_head_of_another_size(images: Path, tmp_path: Path) -> None:
    finish(configure(images, tmp_path / "first", num_steps=1))
    for name in ("dark", "bright"):
        (tmp_path / "two" / name).mkdir(parents=True)
    for path in images.glob("black/*.png"):
        (tmp_path / "two/dark" / path.name).write_bytes(path.read_bytes())
    for path in images.glob("white/*.png"):
        (tmp_path / "two/bright" / path.name).write_bytes(path.read_bytes())
    changes = {"init": str(tmp_path / "first/model"), "init_settings": {}, "num_steps": 1}
    finish(configure(tmp_path / "two", tmp_path / "second", **changes))
    manifest = read_manifest(tmp_path / "second/model")
    assert manifest.architecture_config["labels"] == ["bright", "dark"]
    assert manifest.parent_digest == read_manifest(tmp_path / "first/model").digest
    steps = json.loads((tmp_path / "second/model/preprocessor_config.json").read_text())
    assert steps["crop_size"] == {"height": 8, "width": 8}
