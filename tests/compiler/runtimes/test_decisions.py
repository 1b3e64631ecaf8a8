"""Remembered decisions: the same back, whatever happens to the files."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from deepseek.compiler.runtimes import decisions
from deepseek.compiler.runtimes.selection_policy import Candidate, Decision, Measurement, Numbers, Rejection
from deepseek.core.errors import ConfigError

FAST = Candidate("openvino", "latency", "int8", prior=10)


def make(key=None, times_ms=(1.0, 3.0, 2.0)):
    measurement = Measurement(FAST, Numbers(0.1, 0.99, None, 1.0), times_ms, 4.0, ("found",), ("noted",))
    rejection = Rejection("tvm", "needs apache-tvm")
    return Decision(
        FAST, 20.0, (measurement,), (rejection,), 5.0, key or {"model": "abc123", "inputs": [[[1], "float32"]]}
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    return tmp_path / "decisions"


def test_what_is_remembered_comes_back_and_says_so(folder):
    path = decisions.remember(make(), "resnet50")
    assert path.parent == folder
    found = decisions.recall(make().key)
    assert found.is_remembered
    assert (found.chosen, found.measurements, found.rejections) == (FAST, make().measurements, make().rejections)
    assert found.winner.median_ms == 2.0


def test_another_key_finds_nothing():
    decisions.remember(make(), "resnet50")
    assert decisions.recall({**make().key, "num_threads": 64}) is None


def test_the_default_folder_is_in_the_home(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_CACHE_DIR")
    assert decisions.find_folder().parts[-3:] == (".cache", "deepseek", "decisions")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"times_ms"', '"times"'),
        lambda text: text.replace('"latency"', '"gone"', 1),
        lambda text: json.dumps(json.loads(text) | {"decision": None}),
    ],
    ids=["torn", "empty", "list", "missing", "chosen-unmeasured", "null"],
)
def test_a_corrupted_entry_is_ignored_with_a_warning(damage):
    path = decisions.remember(make(), "resnet50")
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match="measured again"):
        assert decisions.recall(make().key) is None


def test_bytes_that_are_no_text_are_ignored_with_a_warning():
    path = decisions.remember(make(), "resnet50")
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.warns(UserWarning, match="measured again"):
        assert decisions.recall(make().key) is None


def test_an_entry_of_another_version_is_not_used():
    path = decisions.remember(make(), "resnet50")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    assert decisions.recall(make().key) is None


def test_an_entry_under_a_name_that_is_not_its_own_is_not_used():
    path = decisions.remember(make(), "resnet50")
    other = {**make().key, "num_threads": 64}
    path.rename(path.with_name(f"{decisions.digest_key(other)}.json"))
    assert decisions.recall(other) is None


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not remembered"):
        assert decisions.remember(make(), "resnet50") is None
    assert decisions.recall(make().key) is None


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc").is_dir(), reason="needs a file system that root cannot write"
)
def test_a_read_only_folder_costs_a_warning(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", "/proc/deepseek")
    with pytest.warns(UserWarning, match="not remembered"):
        assert decisions.remember(make(), "resnet50") is None


def fill(start, num_rounds):
    start.wait(30)
    for _ in range(num_rounds):
        decisions.remember(make(times_ms=(float(os.getpid()),)), "resnet50")
        assert decisions.recall(make().key) is not None


def test_two_processes_fill_one_key_at_once_and_leave_it_whole(folder):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=fill, args=(start, 50)) for _ in range(2)]
    for each in workers:
        each.start()
    start.set()
    for each in workers:
        each.join(60)
    assert [each.exitcode for each in workers] == [0, 0]
    assert decisions.recall(make().key).winner.times_ms[0] in {float(each.pid) for each in workers}
    assert len(list(folder.iterdir())) == 1


def test_a_model_is_found_by_name_and_by_the_beginning_of_its_digest():
    decisions.remember(make(), "resnet50")
    decisions.remember(make(key={"model": "ffff"}), "bert")
    assert [each.key["model"] for each in decisions.find_decisions("resnet50")] == ["abc123"]
    assert [each.key["model"] for each in decisions.find_decisions("ff")] == ["ffff"]
    assert [name for name, _ in decisions.list_decisions()] == ["bert", "resnet50"]


@pytest.mark.parametrize("model", ["resnet51", ""])
def test_an_unknown_model_is_answered_with_the_known_ones(model):
    with pytest.raises(ConfigError, match="none is remembered"):
        decisions.find_decisions(model)
    decisions.remember(make(), "resnet50")
    with pytest.raises(ConfigError, match="known are resnet50"):
        decisions.find_decisions(model)


def test_the_key_holds_machine_threads_and_versions():
    surroundings = decisions.describe_surroundings(3)
    assert surroundings["num_threads"] == 3
    assert {"torch", "onnxruntime", "openvino", "nncf"} <= set(surroundings["versions"])
    json.dumps(surroundings)
