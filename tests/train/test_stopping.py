"""Early stopping and the best model, from pure numbers to a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.artifact.reading import read_manifest
from deepseek.core.errors import ConfigError
from deepseek.train.loop import train
from deepseek.train.stopping import BestMetric
from tests.train.own_task import Line, configure

VALUES = st.lists(st.floats(-10, 10), min_size=1, max_size=20)


@given(values=VALUES, is_lower_better=st.booleans())
def test_the_best_is_the_first_extreme_value(values: list[float], is_lower_better: bool) -> None:
    best = BestMetric(is_lower_better)
    for number, value in enumerate(values, start=1):
        best.observe(number, value)
    expected = min(values) if is_lower_better else max(values)
    assert (best.value, best.step) == (expected, values.index(expected) + 1)
    assert best.num_without_better == len(values) - best.step


def test_small_changes_and_values_that_are_no_number_are_not_better() -> None:
    best = BestMetric(is_lower_better=True, min_change=0.1)
    assert [best.observe(step, value) for step, value in enumerate([1.0, 0.95, math.nan, 0.8], 1)] == [
        True,
        False,
        False,
        True,
    ]


def test_the_state_is_taken_up() -> None:
    one = BestMetric(is_lower_better=False)
    for step, value in enumerate([0.5, 0.7, 0.6], 1):
        one.observe(step, value)
    other = BestMetric(is_lower_better=False)
    other.load_state_dict(one.state_dict())
    assert other == one


def test_a_run_without_a_better_metric_ends_and_keeps_its_best_model(tmp_path: Path) -> None:
    changes = {
        "evaluate_every": 2,
        "num_steps": 60,
        "stopping.metric": "distance",
        "stopping.patience": 2,
        "stopping.keep_best": True,
        "optimizer.base_learning_rate": 50.0,  # never settles
    }
    config = configure(tmp_path, **changes)

    class Rising(Line):
        lower_is_better = Line.lower_is_better | {"distance"}

    events = list(train(config, task=Rising))
    (stopped,) = [event for event in events if event.kind == "stopped_early"]
    distances = {event.step: event.metrics["distance"] for event in events if event.kind == "evaluated"}
    assert stopped.best == min(distances.values()) == distances[stopped.best_step]
    assert stopped.step == stopped.best_step + 4 == max(distances) < 60
    assert read_manifest(tmp_path / "model").metrics["distance"] == stopped.best
    again = list(train(config, task=Rising))
    assert not [event for event in again if event.kind == "step_done"]
    assert read_manifest(tmp_path / "model").metrics["distance"] == stopped.best


@pytest.mark.parametrize("left_at", ["step_done", "evaluated"])
def test_a_run_that_is_left_around_an_evaluation_decides_as_one_that_was_not(left_at: str, tmp_path: Path) -> None:
    changes = {"evaluate_every": 4, "checkpoint_every": 6, "num_steps": 16, "stopping.keep_best": True}
    whole = list(train(configure(tmp_path / "whole", **changes), task=Line))
    found: list[tuple[int, float]] = []
    for _ in range(9):
        events = train(configure(tmp_path / "parts", **changes), task=Line)
        for event in events:
            if event.kind == "evaluated":
                found.append((event.step, event.heldout_loss))
            if event.kind == left_at and event.step % 4 == 0 and event.step < 16:
                events.close()
        if event.kind == "model_saved":
            break
    assert found == [(event.step, event.heldout_loss) for event in whole if event.kind == "evaluated"]
    one, other = (read_manifest(tmp_path / name / "model") for name in ("whole", "parts"))
    assert (one.metrics, one.data_position) == (other.metrics, other.data_position)


def test_a_metric_that_nobody_measures_is_named(tmp_path: Path) -> None:
    config = configure(tmp_path, evaluate_every=2, **{"stopping.metric": "accuracy", "stopping.patience": 1})
    with pytest.raises(ConfigError, match="'accuracy' and the evaluations measure heldout_loss, distance"):
        list(train(config, task=Line))


def test_stopping_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate_every is 0"):
        configure(tmp_path, **{"stopping.patience": 1})
