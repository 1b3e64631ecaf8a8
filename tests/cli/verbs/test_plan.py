import csv
import json
from xml.etree import ElementTree

import pytest

from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan
from tests.cli.verbs.measured_machine import save_machine

LLAMA = ("plan", "Llama3-8B", "--cluster", "dgx-a100", "--nodes", 2, "--global-batch", 64)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    save_machine(tmp_path)


def test_a_plan_is_printed_with_items_runners_up_and_rejections(call):
    result = call(*LLAMA, "--top", 3)
    assert result.status == 0, result.err
    for word in ("The fastest plan", "Time of one step", "Memory of the fullest device", "Runners-up", "rejected"):
        assert word in result.out
    assert "power limit" in result.out


def test_json_is_what_the_planner_returns(call):
    result = call(*LLAMA, "--json")
    found = plan(get_model_shape("Llama3-8B"), Cluster.of("A100-SXM-80GB", nodes=2), global_batch=64)
    assert json.loads(result.out) == json.loads(json.dumps(found.to_dict()))


def test_a_strategy_narrows_the_plan(call):
    strategy = '{"type": "HybridParallel", "tensorParallel": 4, "pipelineParallel": 4}'
    best = json.loads(call(*LLAMA, "--strategy", strategy, "--json").out)["best"]["plan"]
    assert (best["tp"], best["pp"]) == (4, 4)


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("html", b"<!doctype html>"), ("svg", b"<svg")])
def test_the_timeline_is_drawn(call, tmp_path, ending, start):
    strategy = '{"type": "HybridParallel", "pipelineParallel": 4}'
    path = tmp_path / f"timeline.{ending}"
    assert call(*LLAMA, "--strategy", strategy, "--picture", path).status == 0
    content = path.read_bytes()
    assert content.startswith(start)
    if ending != "png":
        if ending == "svg":
            assert ElementTree.fromstring(content).tag.endswith("svg")
        assert content.count(b">stage ") == 4
        assert content.count(b"<title>forward of micro-batch") >= 4 * 4
        assert b"http" not in content.replace(b"http://www.w3.org/2000/svg", b"")  # nothing is fetched


def test_a_mixed_cluster_shows_what_each_part_gets(call):
    result = call("plan", "Llama3-8B", "--cluster", "dgx-h100:1+dgx-a100:1", "--global-batch", 64)
    assert "What each" in result.out
    assert "A100-SXM-80GB" in result.out


def test_a_recipe_is_planned_for_this_machine(call, machine):
    values = json.loads(call("plan", "quickstart", "--json").out)
    assert values["best"]["plan"]["dp"] == 1
    assert values["best"]["step_time_s"] > 0
    assert values["best"]["energy_j"] is None


def test_runs_are_predicted_into_a_file(call, tmp_path):
    runs = tmp_path / "runs.csv"
    runs.write_text("model,gpu,n_gpus,tp,pp,gbs,mbs,seq\nLlama3-8B,H100,8,2,1,16,1,8192\n", encoding="utf-8")
    out = tmp_path / "predicted.csv"
    assert call("plan", "--predict", runs, "--out", out).status == 0
    with out.open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert "predicted_iter_time_s" in row
    assert "note" in row


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("plan",), "give a model"),
        (("plan", "Llama3-8B", "--cluster", "dgx-a100"), "--global-batch is missing"),
        (("plan", "Llama3-8C", "--cluster", "dgx-a100", "--global-batch", 8), "did you mean 'Llama3-8B'"),
        ((*LLAMA, "--headroom", 1.5), "memory_headroom=1.5"),
        ((*LLAMA, "--max-step-time", "1ms"), "the fastest takes"),
        ((*LLAMA, "--max-step-time", "soon"), "is not a duration"),
        ((*LLAMA, "--precision", "bf61"), "did you mean 'bf16'"),
        ((*LLAMA, "--strategy", "auto"), "is not JSON"),
        ((*LLAMA, "--strategy", "[]"), "is no table"),
        ((*LLAMA, "--picture", "timeline.gif"), "choose one of these endings"),
        (("plan", "--predict", "runs.csv"), "--out is missing"),
        (("plan", "Llama3-8B", "--predict", "runs.csv", "--out", "p.csv"), "--predict takes --out and nothing else"),
        ((*LLAMA, "--out", "plan.json"), "--out belongs to --predict"),
        (("plan", "SC21-GPT-1008.0B", "--cluster", "dgx-a100", "--global-batch", 512), "it fits on"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(call, words, sentence):
    result = call(*words)
    assert result.status == 2
    assert result.err.startswith("deepseek: ")
    assert result.err.count("\n") == 1
    assert sentence in result.err
