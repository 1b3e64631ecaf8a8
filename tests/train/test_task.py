"""A task of one's own goes through the whole loop: training, metrics, the artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek.artifact.reading import open_artifact
from deepseek.core.errors import ConfigError
from deepseek.models.loading import load_model
from deepseek.models.model_sources import load_weights_
from deepseek.train import train
from deepseek.train.tasks import TASKS, find_task
from tests.train.own_task import NUM_POINTS, Line, configure


def test_a_task_of_ones_own_learns_and_is_measured_in_its_own_units(tmp_path: Path) -> None:
    events = list(train(configure(tmp_path, num_steps=200), task=Line))
    (started,) = [event for event in events if event.kind == "run_started"]
    assert (started.task, started.unit, started.num_train_units) == ("Line", "points", NUM_POINTS)
    (evaluated,) = [event for event in events if event.kind == "evaluated"]
    assert (evaluated.num_units, evaluated.unit) == (NUM_POINTS, "points")
    manifest = open_artifact(tmp_path / "model").manifest
    assert manifest.metrics == evaluated.all_metrics
    model = Line(configure(tmp_path)).build_model(None).eval()  # type: ignore[arg-type]
    load_weights_(model, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"a class that deepseek does not have; build it yourself and fill it"):
        load_model(tmp_path / "model")
    inputs = torch.arange(NUM_POINTS)[:, None] / NUM_POINTS
    with torch.no_grad():
        distances = (model(inputs) - 2 * inputs[:, 0]).abs()
    assert evaluated.metrics["distance"] == pytest.approx(distances.mean().item(), rel=1e-5)
    assert evaluated.heldout_loss == pytest.approx(distances.square().mean().item(), rel=1e-5)
    assert evaluated.metrics["distance"] < 0.2


def test_every_task_of_the_table_is_there_and_an_unknown_one_is_answered_with_the_nearest() -> None:
    assert all(issubclass(find_task(kind), object) and find_task(kind).unit for kind in TASKS)
    with pytest.raises(ConfigError, match="did you mean 'causal_lm'"):
        find_task("casual_lm")


def test_a_task_is_named_in_a_config_with_or_without_settings() -> None:
    config = configure(Path("runs"))
    assert config.override({"task": "causal_lm"}) == config.override({"task": {"kind": "causal_lm"}}) == config
    with pytest.raises(ConfigError, match="task"):
        config.override({"task": "causal"})
