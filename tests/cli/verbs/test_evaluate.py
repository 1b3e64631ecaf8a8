"""`deepseek evaluate` prints what `evaluate_model` finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.train.loop import train
from deepseek.train.model_evaluation import evaluate_model
from tests.cli.commands import Result, assert_one_sentence
from tests.train import own_task

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


def test_a_task_of_ones_own_is_measured_on_what_it_holds_out(call: Call, tmp_path: Path) -> None:
    for _ in train(own_task.configure(tmp_path / "run"), task=own_task.Line):
        pass
    result = call("evaluate", tmp_path / "run", "--task", "tests.train.own_task:Line", "--json")
    assert (result.status, result.err) == (0, f"deepseek: note: measured on {json.loads(result.out)['data']}\n")
    assert json.loads(result.out)["metrics"]["distance"] >= 0
    assert_one_sentence(call("evaluate", tmp_path / "run"), 2, "--task MODULE:CLASS")
    assert_one_sentence(call("evaluate", tmp_path / "run", "--task", "tests.train.own_task:Nothing"), 2, "Nothing")
