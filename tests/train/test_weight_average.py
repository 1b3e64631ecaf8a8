"""The average against its formula, in a run and through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deepseek.artifact.reading import open_artifact
from deepseek.train.loop import train
from deepseek.train.weight_average import WeightAverage
from tests.train.own_task import Line, configure


def test_averages_follow_the_formula_and_leave_frozen_weights_alone() -> None:
    model = nn.Linear(3, 2).double()
    model.bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    expected = model.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 8):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=generator, dtype=torch.float64))
        average.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * model.weight
    now = model.weight.detach().clone()
    with average.swapped():
        torch.testing.assert_close(model.weight, expected)
    assert torch.equal(model.weight, now)


def test_an_error_inside_leaves_the_weights_in_their_place() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1)
    before = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), average.swapped():
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)


def test_a_run_saves_its_average_also_when_it_was_stopped(tmp_path: Path) -> None:
    for _ in train(configure(tmp_path / "plain"), task=Line):
        pass
    for _ in train(configure(tmp_path / "whole", ema_decay=0.8), task=Line):
        pass
    for event in (events := train(configure(tmp_path / "parts", ema_decay=0.8), task=Line)):
        if event.kind == "step_done" and event.step == 13:
            events.close()
            break
    for _ in train(configure(tmp_path / "parts", ema_decay=0.8), task=Line):
        pass
    plain, whole, parts = (open_artifact(tmp_path / name / "model").tensors() for name in ("plain", "whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert not torch.equal(plain["0.weight"], whole["0.weight"])
    assert torch.equal(plain["1.running_mean"], whole["1.running_mean"])


def test_frozen_weights_are_saved_as_they_began_beside_averages_of_the_others(tmp_path: Path) -> None:
    changes = {"freeze": ["0"], "ema_decay": 0.8, "on_bad_step": "skip"}
    task = Line(configure(tmp_path / "run", **changes))
    torch.manual_seed(task.config.seed)
    began = task.build_model(task.open_data(tmp_path)).state_dict()
    for _ in train(task.config, task=Line):
        pass
    for _ in train(configure(tmp_path / "plain", freeze=["0"]), task=Line):
        pass
    saved, plain = (open_artifact(tmp_path / name / "model").tensors() for name in ("run", "plain"))
    assert torch.equal(saved["0.weight"], began["0.weight"]) and torch.equal(saved["0.bias"], began["0.bias"])
    assert not torch.equal(saved["2.weight"], plain["2.weight"])
