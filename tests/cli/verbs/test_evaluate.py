"""`deepseek evaluate` prints what `evaluate_model` finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.train.model_evaluation import evaluate_model
from tests.cli.commands import Result, assert_one_sentence

Call = Callable[..., Result]


def test_the_table_and_the_json_are_the_report(call: Call, model: Path, corpus: Path) -> None:
    report = evaluate_model(model, corpus)
    result = call("evaluate", model, "--data", corpus, "--json")
    assert (result.status, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["metrics"] == pytest.approx(report.metrics)
    assert (found["task"], found["unit"], found["num_units"]) == ("causal_lm", "tokens", report.num_units)
    table = call("evaluate", model, "--data", corpus).out
    assert f"{report.metrics['perplexity']:.4f}" in table
    assert f"{report.metrics['loss_low']:.4f} to {report.metrics['loss_high']:.4f}" in table


def test_settings_are_those_of_a_run(call: Call, model: Path, corpus: Path) -> None:
    short = call("evaluate", model, "--data", corpus, "--json", "--set", "data.sequence_length=16")
    assert json.loads(short.out)["metrics"] != evaluate_model(model, corpus).metrics


def test_what_cannot_be_measured_is_one_sentence(call: Call, model: Path, tmp_path: Path) -> None:
    assert_one_sentence(call("evaluate", model, "--data", tmp_path / "nowhere"), 1, "holds no file")
    assert_one_sentence(call("evaluate", model, "--data", tmp_path, "--task", "sleeping"), 2, "unknown kind of task")
