"""A task of one's own for tests: a line through points, one of which may be no number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepseek.data.samples import SampleLoader, evaluation_batches
from deepseek.train.config import TrainConfig
from deepseek.train.task import Measurements, Task, TaskData

NUM_POINTS = 24


class Points:
    """y = 2 x + noise that the sample's generator draws."""

    digest = "points"

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return NUM_POINTS

    def load(self, index: int, random: np.random.Generator | None) -> Tensor:
        noise = 0.0 if random is None else 0.01 * random.standard_normal()
        return torch.tensor([index / NUM_POINTS, torch.nan if index in self.bad else 2 * index / NUM_POINTS + noise])


class Distance:
    def __init__(self) -> None:
        self.distances: list[float] = []

    def update(self, outputs: Tensor, batch: Tensor) -> None:
        self.distances += (outputs - batch[:, 1]).abs().tolist()

    def compute(self) -> dict[str, float]:
        return {"distance": sum(self.distances) / len(self.distances)}


class Line(Task):
    unit = "points"
    bad: tuple[int, ...] = ()

    def open_data(self, folder: Path) -> TaskData:
        loader = SampleLoader(Points(self.bad), batch_size=4, collate=torch.stack)
        return TaskData(loader, NUM_POINTS, lambda: evaluation_batches(Points(), 8, torch.stack))

    def build_model(self, data: TaskData) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0))

    def inputs(self, batch: Tensor) -> tuple[Tensor, ...]:
        return (batch[:, :1],)

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs - batch[:, 1]).square().sum()

    def count_units(self, batch: Tensor) -> int:
        return len(batch)

    def new_metrics(self) -> Measurements:
        return Distance()


def line_with(*bad: int) -> type[Line]:
    """The task whose points `bad` are no numbers."""
    return type("Line", (Line,), {"bad": bad})


def configure(folder: Path, **changes: Any) -> TrainConfig:
    values = {
        "folder": str(folder),
        "optimizer": {
            "name": "sgd",
            "base_learning_rate": 1.6,
            "schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
        },
        "num_steps": 30,
        "log_every": 1,
        "checkpoint_every": 4,
        "precision": "fp32",
        "data": {"batch_size": 4},
    }
    return TrainConfig.from_dict(values).override(changes)


def positions(events: Iterator[Any], kind: str) -> list[Any]:
    return [event for event in events if event.kind == kind]
