"""What is read from the events of a run."""

from __future__ import annotations

from pathlib import Path

from deepseek.train import train
from deepseek.train.events import Evaluated, read_curves
from tests.train.own_task import Line, configure


def test_the_curves_of_a_run_are_read_from_its_events(tmp_path: Path) -> None:
    events = [event.to_dict() for event in train(configure(tmp_path, evaluate_every=10), task=Line)]
    curves = read_curves(events)
    assert curves.unit == "points"
    assert list(curves.losses) == list(range(1, 31))
    evaluated = [event for event in events if event["kind"] == "evaluated"]
    assert curves.heldout_losses == {event["step"]: event["heldout_loss"] for event in evaluated}
    assert list(curves.metrics["distance"]) == [10, 20, 30]


def test_the_ends_of_an_interval_are_no_curves() -> None:
    metrics = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "recall_low": 0.1}
    event = Evaluated(3, 1.0, metrics, 10, "images").to_dict()
    assert read_curves([event]).metrics == {"accuracy": {3: 0.5}, "recall_low": {3: 0.1}}
