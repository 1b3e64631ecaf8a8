"""Detection: mAP@0.5 on held-out scenes >= that of the published recipe, written plainly, after as many pictures.

    python -m benchmarks.train_tasks detection --pictures FOLDER [--photographs FOLDER]

Both sides train the YOLOv7-tiny of the recipe `yolov7_tiny_scenes` from the same weights on the same batches of
composed scenes, and are measured alike. `--pictures` holds a folder of cut-out PNG files for each class, emoji for
example; unless given, handwritten digits of scikit-learn are put on its photographs. The other side is the authors'
train.py: SGD with Nesterov momentum, three groups of parameters, gradients added up to 64 images, a warm-up of rate,
momentum and number of batches, a cosine, a ramped average of the weights, and the loss with its means over the batch.
It differs in one thing: its warm-up, 1,000 batches at least there, is cut to a tenth of so short a run. What both
share, since the tests check it against loops, is the assignment and the complete IoU.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks import measuring
from benchmarks.measuring import Bar, Row, report
from deepseek.data.boxes import BoxBatch
from deepseek.data.config import BoxesConfig
from deepseek.models.yolov7.label_assignment import ObjectTargets, find_candidates, match
from deepseek.models.yolov7.model import NUM_BOX, YOLOv7
from deepseek.models.yolov7.training_loss import (
    LEVEL_BALANCE,
    REFERENCE_CLASSES,
    REFERENCE_SIZE,
    DetectionLossConfig,
    complete_iou,
    read_candidates,
)
from deepseek.recipes import load_recipe, yolov7_tiny_scenes
from deepseek.train import TrainConfig, train
from deepseek.train.evaluation import evaluate
from deepseek.train.tasks.detection import Detection

NOMINAL_BATCH = 64
RATE, LAST_RATE_SHARE, MOMENTUM, DECAY = 0.01, 0.01, 0.937, 0.0005
FIRST_MOMENTUM, FIRST_BIAS_RATE, WARMUP_SHARE = 0.8, 0.1, 0.1
AVERAGE_DECAY, AVERAGE_RAMP = 0.9999, 2000
NAMES = ("map_50", "map_50_95")
DIGITS_PER_CLASS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this section."""
    measuring.add_options(parser)
    parser.add_argument("--pictures", type=Path, help="a folder of PNG files for each class; digits unless given")
    parser.add_argument("--photographs", type=Path, help="a folder of photographs; scikit-learn's unless given")
    parser.add_argument("--steps", type=int, help="optimizer steps; the recipe's unless given")


def run(arguments: argparse.Namespace) -> None:
    """Train both sides and report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configure(folder, arguments)
        if arguments.quick:
            yolov7_tiny_scenes.NUM_TRAIN, yolov7_tiny_scenes.NUM_HELDOUT = 16, 8
        photographs = arguments.photographs or find_photographs()
        pictures = arguments.pictures or cut_out_digits(folder / "digits")
        yolov7_tiny_scenes.compose_data(pictures, photographs, folder / "scenes")
        sides = {"deepseek": train_ours(config), "the published recipe, plain": train_plainly(config)}
    rows = [
        Row(f"{side}, {measure}", values[measure], None, None, "")
        for side, values in sides.items()
        for measure in (*NAMES, "images/s")
    ]
    ours, theirs = (values["map_50"] for values in sides.values())
    title = f"after {config.num_steps} steps of {config.sequences_per_step} images"
    bars = [Bar("mAP@0.5, ours less the plain recipe's", ours - theirs, 0.0)]
    report("train_tasks detection", title, rows, bars, arguments)


def configure(folder: Path, arguments: argparse.Namespace) -> TrainConfig:
    """Return the recipe's config with the data and the run in `folder`."""
    parts = {"": "train", "heldout_": "heldout"}
    changes = {f"data.{prefix}images": str(folder / "scenes" / part / "images") for prefix, part in parts.items()}
    for prefix, part in parts.items():
        changes[f"data.{prefix}annotations"] = str(folder / "scenes" / part / "annotations.json")
    config = load_recipe("yolov7_tiny_scenes").override(
        changes | {"folder": str(folder / "run"), "evaluate_every": 0, "precision": "fp32"}
    )
    if arguments.quick:
        small = {"init_settings": {"width_multiple": 0.125}, "data.batch_size": 4, "num_steps": 8}
        config = config.override(small | {"data.image_size": 96})
    return config if arguments.steps is None else config.override({"num_steps": arguments.steps})


def cut_out_digits(folder: Path) -> Path:
    """Write some of scikit-learn's digits as pictures, each in a color of its own and opaque where there is ink."""
    digits, random = load_digits(), np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for number, ink_HW in enumerate(digits.images[digits.target == label][:DIGITS_PER_CLASS]):
            color = random.integers(256, size=3)
            picture_HW4 = np.concatenate([np.tile(color, (*ink_HW.shape, 1)), ink_HW[..., None] * 255 / 16], axis=2)
            picture = Image.fromarray(picture_HW4.round().astype(np.uint8))
            picture.resize((64, 64), Image.Resampling.BICUBIC).save(folder / str(label) / f"{number:03d}.png")
    return folder


def find_photographs() -> Path:
    """Return the folder of scikit-learn's photographs."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-learn is not installed; give --photographs FOLDER")
    return Path(spec.origin).parent / "datasets" / "images"


def train_ours(config: TrainConfig) -> dict[str, float]:
    """Train with the trainer."""
    rates, metrics = [], {}
    for event in train(config):
        if event.kind == "step_done" and event.step > 1:
            rates.append(event.units_per_s)
        elif event.kind == "evaluated":
            metrics = event.metrics
    return {**metrics, "images/s": sum(rates) / max(1, len(rates))}


def train_plainly(config: TrainConfig) -> dict[str, float]:
    """Train with the authors' loop."""
    task = Detection(config)
    data = task.open_data(Path(config.folder))
    torch.manual_seed(config.seed)
    model = cast("YOLOv7", task.build_model(data).train())
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = build_sgd(model, config)
    gains = DetectionLossConfig()
    batch_size, num_batches = config.data.rows_per_batch, config.num_steps * config.accum_steps
    num_warmup = max(1, round(WARMUP_SHARE * num_batches))
    num_updates = last_update = 0
    began_s = time.perf_counter()
    for number in range(num_batches):
        batch: BoxBatch = data.loader.next_batch()
        factor = (1 + math.cos(number * math.pi / num_batches)) / 2 * (1 - LAST_RATE_SHARE) + LAST_RATE_SHARE
        warm = min(1.0, number / num_warmup)
        num_added = max(1, round(1 + warm * (NOMINAL_BATCH / batch_size - 1)))
        for group in optimizer.param_groups:
            first = FIRST_BIAS_RATE if group["is_bias"] else 0.0
            group["lr"] = first + warm * (RATE * factor - first)
            group["momentum"] = FIRST_MOMENTUM + warm * (MOMENTUM - FIRST_MOMENTUM)
        published_loss(model, batch, gains).backward()
        if number + 1 - last_update >= num_added:
            optimizer.step()
            optimizer.zero_grad()
            num_updates, last_update = num_updates + 1, number + 1
            update_average_(average, model, AVERAGE_DECAY * (1 - math.exp(-num_updates / AVERAGE_RAMP)))
    rate = num_batches * batch_size / (time.perf_counter() - began_s)
    assert data.heldout is not None
    metrics, _ = evaluate(task, average, data.heldout(), precision="fp32")
    return {name: metrics[name] for name in NAMES} | {"images/s": rate}


def build_sgd(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Build the optimizer: decay for what multiplies, none for norms and biases, and a rate of their own for biases."""
    settings = config.data_of(BoxesConfig)
    num_added = max(round(NOMINAL_BATCH / settings.batch_size), 1)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    norms = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    known = {id(value) for value in (*biases, *norms)}
    others = [value for value in model.parameters() if id(value) not in known]
    groups = [
        {"params": norms, "is_bias": False},
        {
            "params": others,
            "is_bias": False,
            "weight_decay": DECAY * settings.batch_size * num_added / NOMINAL_BATCH,
        },
        {"params": biases, "is_bias": True},
    ]
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, nesterov=True)


def published_loss(model: YOLOv7, batch: BoxBatch, gains: DetectionLossConfig) -> Tensor:
    """Compute the loss of a batch as published: means over the matches of each level, times the number of images."""
    raw, anchors_LA2 = model.predict_raw(batch.images_BCHW), model.head.anchor_grid[:, 0, :, 0, 0]
    objects = ObjectTargets(batch.boxes_N4, batch.labels_N, batch.images_N)
    candidates = find_candidates(raw, objects, anchors_LA2, max_ratio=gains.max_anchor_ratio)
    outputs_CO, boxes_C4 = read_candidates(raw, candidates, anchors_LA2)
    answers_C = match(candidates, outputs_CO, boxes_C4, objects, len(raw[0]))
    box = classes = objectness = torch.zeros(())
    for level, balance in enumerate(LEVEL_BALANCE):
        target_BAHW = torch.zeros_like(raw[level][..., NUM_BOX - 1])
        mine_C = (candidates.levels_C == level) & (answers_C >= 0)
        if mine_C.any():
            answers_M = answers_C[mine_C]
            ciou_M = complete_iou(boxes_C4[mine_C], objects.boxes_N4[answers_M])
            box = box + (1 - ciou_M).mean()
            targets_MK = F.one_hot(objects.labels_N[answers_M], outputs_CO.shape[1] - NUM_BOX).float()
            classes = classes + F.binary_cross_entropy_with_logits(outputs_CO[mine_C, NUM_BOX:], targets_MK)
            parts = (candidates.images_C, candidates.anchors_C, candidates.rows_C, candidates.columns_C)
            target_BAHW[tuple(part[mine_C] for part in parts)] = ciou_M.detach().clamp(min=0)
        objectness = objectness + balance * F.binary_cross_entropy_with_logits(
            raw[level][..., NUM_BOX - 1], target_BAHW
        )
    size, num_classes = batch.images_BCHW.shape[-1], outputs_CO.shape[1] - NUM_BOX
    total = gains.box_gain * box
    total = total + gains.objectness_gain * (size / REFERENCE_SIZE) ** 2 * objectness
    return (total + gains.class_gain * num_classes / REFERENCE_CLASSES * classes) * len(batch.images_BCHW)


@torch.no_grad()
def update_average_(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average of weights and statistics towards the model."""
    current = dict(_floats(model))
    for name, value in _floats(average):
        value.lerp_(current[name], 1 - decay)


def _floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.state_dict().items() if value.is_floating_point())
