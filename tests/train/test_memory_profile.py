"""Runs that leak, in two ways, and runs that do not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek.artifact.reading import open_artifact
from deepseek.core.errors import ConfigError
from deepseek.train.config import TrainConfig
from deepseek.train.events import MemoryLeakSuspected, MemoryMeasured
from deepseek.train.loop import train
from deepseek.train.memory_profile import LOOKS, PAGE, find_constant, find_growing
from deepseek.train.task import TaskData
from tests.train.own_task import Line, configure

pytestmark = pytest.mark.usefixtures("few_objects")  # a look goes through all of them


class Hoarding(nn.Module):
    """Remembers everything it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach() + 1)
        return x


class HoardingLine(Line):
    def build_model(self, data: TaskData) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.Sequential(nn.Tanh(), Hoarding()), nn.Linear(4, 1), nn.Flatten(0))


class SummingLine(Line):
    """Adds a measurement up with all that computed it, which only autograd holds."""

    total: Tensor | float = 0.0

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        self.total = self.total + outputs.exp().sum()
        return super().loss(outputs, batch)


def run(folder: Path, task: type[Line], **changes: Any) -> list[Any]:
    return list(train(configure(folder, **{"ds_memory_profiler": True, "num_steps": 8} | changes), task=task))


def test_a_run_without_a_leak_is_measured_once_and_accused_of_nothing(tmp_path: Path) -> None:
    events = run(tmp_path, Line, memory_profiler_step=2, ema_decay=0.9, **{"optimizer.adaptive_clip": 90})
    (measured,) = [event for event in events if isinstance(event, MemoryMeasured)]
    assert not [event for event in events if isinstance(event, MemoryLeakSuspected)]
    assert measured.step == 2 and measured.peak_bytes == sum(measured.peak_by_kind.values())
    num_numbers = 2 * 4 + (4 + 4) + (4 + 4) + 5  # weights, and the scale, shift, mean and variance of a batch norm
    assert measured.peak_by_kind["parameters"] == 4 * num_numbers + 8  # and the count of its batches
    assert (tmp_path / PAGE).read_text().count("<path") == 6
    assert measured.allocator_peak_bytes is None


def test_tensors_that_a_module_hoards_are_found_with_the_module(tmp_path: Path) -> None:
    events = run(tmp_path, HoardingLine)
    (leak,) = [event for event in events if isinstance(event, MemoryLeakSuspected)]
    assert leak.modules == ("1.1",) and leak.tensors == ("float32[4, 4] left by each step",)
    assert leak.step <= LOOKS + 1
    assert "1.1" in (tmp_path / PAGE).read_text().split("Suspected leak")[1]


def test_a_graph_that_only_autograd_holds_is_found(tmp_path: Path) -> None:
    events = run(tmp_path, SummingLine)
    (leak,) = [event for event in events if isinstance(event, MemoryLeakSuspected)]
    assert leak.tensors == ("float32[4] left by each step",) and leak.modules == ("outside of the model",)


def test_a_run_that_is_watched_learns_the_same_to_the_bit_and_may_go_on_unwatched(tmp_path: Path) -> None:
    list(train(configure(tmp_path / "plain", num_steps=8), task=Line))
    run(tmp_path / "watched", Line)
    for event in (events := train(configure(tmp_path / "parts", num_steps=8, ds_memory_profiler=True), task=Line)):
        if event.kind == "step_done" and event.step == 4:
            events.close()
            break
    list(train(configure(tmp_path / "parts", num_steps=8), task=Line))
    plain, watched, parts = (
        open_artifact(tmp_path / name / "model").tensors() for name in ("plain", "watched", "parts")
    )
    assert all(
        torch.equal(tensor, watched[name]) and torch.equal(tensor, parts[name]) for name, tensor in plain.items()
    )


def test_growth_is_what_rises_at_every_look() -> None:
    counts = [Counter(up=number, wave=number % 2, flat=3) for number in range(LOOKS + 1)]
    assert find_growing(counts) == {"up": LOOKS}
    assert find_growing(counts[1:]) == {}
    left = [Counter({("a", "x"): number + 1, ("b", "y"): 1}) for number in range(LOOKS)]
    assert find_constant(left) == {("a", "x"): 1, ("b", "y"): 1}
    assert find_constant([*left[1:], Counter({("a", "x"): 2})]) == {("a", "x"): 2}
    assert find_constant(left[1:]) == {}


def test_code_that_allocates_unseen_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile is blocks, whose code allocates unseen; set compile=none"):
        TrainConfig(ds_memory_profiler=True, compile="blocks")
