"""Image classification: images/s >= 1.3x a plain eager PyTorch loop, and >= 1.0x Lightning Fabric with the same model.

    python -m benchmarks.train_tasks images [--pictures FOLDER]

Our side is `deepseek.train.train` as `deepseek train` calls it: its loader, augmentation and step, and its settings of
the process. The plain side is the loop that one writes by hand, around torch's `DataLoader` with as many workers, its
optimizer and `clip_grad_norm_`, with images as floats from the data set; a second one has its channels last, as torch's
guide to performance says, and is a row without a goal. Fabric runs the plain loop by its documentation. Every side is a
process of its own, and they take turns.

All sides begin with the same weights and see the same images, augmented alike by functions of ours on Pillow's images,
in FP32; that their first losses agree is a bar as well. The images are pieces of the two photographs that scikit-learn
ships, as JPEG files, unless `--pictures` names a folder with a folder for each class.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.measuring import Bar, Row, Side, measure, ratio, report
from benchmarks.training.turns import Round, RunningSide, serve, set_up_as_the_command_does, started

OURS, PLAIN, PLAIN_LAST, FABRIC = "deepseek", "plain eager", "plain eager, channels last", "Lightning Fabric"
IMAGE_SIZE, BATCH_SIZE, GRAD_CLIP, MOMENTUM = 64, 32, 1.0, 0.9
PIECE_SIZE, PIECES_PER_CLASS = 96, 400
NUM_COMPARED = 3  # losses from the first on: differences in rounding grow from step to step
MORE_STEPS = 100_000  # than any side takes here


@dataclass(frozen=True)
class Workload:
    """One model, and how it is trained."""

    model: str
    optimizer: str
    learning_rate: float
    steps_per_round: int


WORKLOADS = {
    workload.model: workload
    for workload in (Workload("resnet18", "sgd", 0.005, 8), Workload("mobilenet_v3_small", "adamw", 3e-4, 20))
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this section."""
    measuring.add_options(parser)
    parser.add_argument("--pictures", type=Path, help="a folder of images for each class; pieces of photographs if not")
    parser.add_argument("--model", choices=WORKLOADS, help="train this one alone")


def run(arguments: argparse.Namespace) -> None:
    """Measure both models and report."""
    rows: list[Row] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as temporary:
        pictures = arguments.pictures or cut_photographs(Path(temporary) / "pictures")
        for workload in WORKLOADS.values() if arguments.model is None else [WORKLOADS[arguments.model]]:
            found, goals = run_workload(workload, pictures, Path(temporary), is_quick=arguments.quick)
            rows += found
            bars += goals
    report("train_tasks images", "images/s", rows, bars, arguments)


def run_workload(workload: Workload, pictures: Path, folder: Path, *, is_quick: bool) -> tuple[list[Row], list[Bar]]:
    """Train one model on every side in turns."""
    running: dict[str, RunningSide] = {}
    sides: list[Side] = []
    with ExitStack() as stack:
        for name in ROUNDS:
            label = f"{workload.model}: {name}"
            if name == FABRIC and find_spec("lightning_fabric") is None:
                sides.append(Side(label, None, "not installed; see benchmarks/peers.txt"))
                continue
            order = {"side": name, "workload": asdict(workload), "pictures": str(pictures), "folder": str(folder)}
            running[name] = stack.enter_context(started("benchmarks.training.images", order))
            sides.append(Side(label, running[name].rate))
        rows = measure(sides, num_rounds=1 if is_quick else 5)
    ours = running[OURS].losses[:NUM_COMPARED]
    difference = max(
        abs(loss / own - 1)
        for side in running.values()
        for loss, own in zip(side.losses[:NUM_COMPARED], ours, strict=True)
    )
    rates = [side.name for side in sides]
    return rows, [
        Bar(f"{workload.model}: ours / plain eager", ratio(rows, rates[0], rates[1]), 1.3),
        Bar(f"{workload.model}: ours / Lightning Fabric", ratio(rows, rates[0], rates[-1]), 1.0),
        Bar(f"{workload.model}: largest difference of the first losses", difference, 5e-3, at_least=False),
    ]


def cut_photographs(folder: Path) -> Path:
    """Cut random squares out of scikit-learn's photographs, as a folder of JPEG files for each photograph."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random, samples = np.random.default_rng(0), load_sample_images()
    for name, pixels_HWC in zip(samples.filenames, samples.images, strict=True):
        photograph, places = Image.fromarray(pixels_HWC), folder / Path(name).stem
        places.mkdir(parents=True)
        for number in range(PIECES_PER_CLASS):
            side = int(random.integers(PIECE_SIZE, photograph.height))
            left, top = (int(random.integers(edge - side)) for edge in photograph.size)
            piece = photograph.crop((left, top, left + side, top + side)).resize((PIECE_SIZE, PIECE_SIZE))
            piece.save(places / f"{number:03d}.jpg", quality=90)
    return folder


# ---- the sides, each in its process


def configure(order: dict[str, Any]) -> Any:
    """Return our config, which says for all sides what is trained."""
    from deepseek.train import TrainConfig

    workload = Workload(**order["workload"])
    return TrainConfig.from_dict(
        {
            "folder": str(Path(order["folder"]) / f"run-{workload.model}"),
            "task": {"kind": "image_classification", "label_smoothing": 0.0},
            "init": workload.model,
            "data": {
                "sources": [order["pictures"]],
                "heldout_fraction": 0.0,
                "image_size": IMAGE_SIZE,
                "batch_size": BATCH_SIZE,
                "augmentation": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
            },
            "optimizer": {
                "name": workload.optimizer,
                "base_learning_rate": workload.learning_rate,
                "reference_batch_size": BATCH_SIZE,
                "betas": (0.9, 0.999),
                "momentum": MOMENTUM,
                "weight_decay": 0.0,
                "grad_clip": GRAD_CLIP,
                "schedule": "constant",
                "warmup_steps": 0,
            },
            "precision": "fp32",
            "num_steps": MORE_STEPS,
            "log_every": 1,
        }
    )


def train_ours(order: dict[str, Any]) -> Iterator[Round]:
    """Train with the trainer, in a process set up as the command line does."""
    set_up_as_the_command_does()
    from deepseek.train import train

    losses: list[float] = []
    for event in train(configure(order)):
        if event.kind == "step_done":
            losses.append(event.loss)
        if len(losses) == order["workload"]["steps_per_round"]:
            yield BATCH_SIZE * len(losses), losses
            losses = []


def train_plainly(order: dict[str, Any], *, is_channels_last: bool = False) -> Iterator[Round]:
    """Train with a loop written by hand."""
    import torch

    model, optimizer, loader = build_plainly(order)
    if is_channels_last:
        model = model.to(memory_format=torch.channels_last)

    def step(images_BCHW: torch.Tensor, targets_B: torch.Tensor) -> float:
        if is_channels_last:
            images_BCHW = images_BCHW.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images_BCHW), targets_B)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        return loss.item()

    return loop(step, loader, order["workload"]["steps_per_round"])


def train_with_fabric(order: dict[str, Any]) -> Iterator[Round]:
    """Train the plain loop as Fabric's documentation has it."""
    import torch
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    model, optimizer, loader = build_plainly(order)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)

    def step(images_BCHW: torch.Tensor, targets_B: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images_BCHW), targets_B)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=GRAD_CLIP)
        optimizer.step()
        return loss.item()

    return loop(step, loader, order["workload"]["steps_per_round"])


def loop(step: Callable[..., float], loader: Any, steps_per_round: int) -> Iterator[Round]:
    """Step after step, a number of them to a round."""
    losses: list[float] = []
    for images_BCHW, targets_B in loader:
        losses.append(step(images_BCHW, targets_B))
        if len(losses) == steps_per_round:
            yield BATCH_SIZE * len(losses), losses
            losses = []


def build_plainly(order: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the model with the weights that our run begins with, its optimizer, and torch's loader of the images."""
    import torch
    from torch.utils.data import DataLoader

    from deepseek.data.labelled_images import open_images
    from deepseek.data.samples import choose_num_workers, list_batches
    from deepseek.models import zoo

    config, workload = configure(order), Workload(**order["workload"])
    images = open_images(config.data)
    torch.manual_seed(config.seed)
    model = zoo.build(workload.model, num_classes=len(images.classes)).train()
    if workload.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=workload.learning_rate, momentum=MOMENTUM)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=workload.learning_rate, weight_decay=0.0)
    plan = list_batches(len(images.train), BATCH_SIZE, seed=0, rank=0, world_size=1, epoch=0, index=0)
    loader = DataLoader(
        FloatImages(images.train, config.data.mean, config.data.std),
        batch_sampler=Items(plan),
        num_workers=choose_num_workers(None),
    )
    return model, optimizer, loader


class Items:
    """The samples of each batch, in the order in which our run takes them: what torch calls a batch sampler."""

    def __init__(self, plan: Iterator[Any]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[Any]:
        return (batch.items for batch in self.plan)


class FloatImages:
    """Images as a data set written by hand gives them: floats, normalized, with the number of the class."""

    def __init__(self, source: Any, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        import torch

        self.source = source
        self.mean, self.deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, int]:
        import numpy as np
        import torch

        epoch, index = item
        sample = self.source.load(index, np.random.Generator(np.random.PCG64([0, epoch, index])))
        image_CHW = torch.from_numpy(sample.pixels_HWC).permute(2, 0, 1).contiguous().float().div(255)
        return image_CHW.sub_(self.mean).div_(self.deviation), sample.target


ROUNDS: dict[str, Callable[[dict[str, Any]], Iterator[Round]]] = {
    OURS: train_ours,
    PLAIN: train_plainly,
    PLAIN_LAST: lambda order: train_plainly(order, is_channels_last=True),
    FABRIC: train_with_fabric,
}

if __name__ == "__main__":
    import json

    ordered = json.loads(sys.argv[1])
    serve(ROUNDS[ordered["side"]](ordered))
