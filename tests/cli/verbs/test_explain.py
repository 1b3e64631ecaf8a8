"""`deepseek explain`: stored decisions as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.compiler.runtimes import decisions
from deepseek.compiler.runtimes.selection_policy import Candidate, Decision, Measurement, Numbers, Rejection
from tests.cli.commands import Result, assert_one_sentence

Call = Callable[..., Result]
FAST = Candidate("openvino", "latency", "int8")
SLOW = Candidate("eager", "plain", "fp32")


@pytest.fixture
def decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decision:
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    key = {"model": "abc123", "inputs": [[[1, 3], "float32"]], "precisions": ["int8"], "num_threads": 2, "machine": {}}
    measurements = (
        Measurement(FAST, Numbers(0.1, 0.99, None, 1.0), (5.0,), 4.0),
        Measurement(SLOW, Numbers(0.0, 1.0, None, 1.0), (30.0,), 0.1),
    )
    made = Decision(FAST, 30.0, measurements, (Rejection("tvm", "needs apache-tvm"),), 5.0, key)
    decisions.remember(made, "resnet50")
    return made


def test_the_tables_show_every_measurement_and_every_refusal(call: Call, decision: Decision) -> None:
    result = call("explain", "resnet50")
    assert (result.status, result.err) == (0, "")
    for said in ("openvino latency int8: 5 ms a call, 6.00 times eager FP32", "eager plain fp32", "apache-tvm"):
        assert said in result.out


def test_json_is_the_decision(call: Call, decision: Decision) -> None:
    (values,) = json.loads(call("explain", "abc", "--json").out)["decisions"]
    assert decisions.from_dict(values).measurements == decision.measurements


def test_an_unknown_model_is_one_sentence(call: Call, decision: Decision) -> None:
    result = call("explain", "resnet51")
    assert_one_sentence(result, 2, "resnet51", "resnet50")
