import csv
import json
from xml.etree import ElementTree

import pytest

from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan
from tests.cli.commands import assert_one_sentence
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


def test_a_length_is_written_as_contexts_are(call):
    for said, tokens in (("4k", 4096), ("1.5K", 1536), ("2048", 2048)):
        assert f"64 of {tokens} tokens" in call(*LLAMA, "--sequence", said, "--top", 0).out


def test_days_and_cost_are_said_to_be_floors(call):
    out = call(*LLAMA, "--tokens", "1T", "--price-per-device-hour", 2, "--top", 0).out
    assert out.count("at least") == 3
    assert "without failures, restarts, checkpoints, evaluation and idle devices" in out


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
        ((*LLAMA, "--max-step-time", "soon"), "is not a duration"),
        ((*LLAMA, "--precision", "bf61"), "did you mean 'bf16'"),
        ((*LLAMA, "--strategy", "auto"), "is not JSON"),
        ((*LLAMA, "--strategy", "[]"), "is no table"),
        ((*LLAMA, "--picture", "timeline.gif"), "choose one of these endings"),
        (("plan", "--predict", "runs.csv"), "--out is missing"),
        (("plan", "Llama3-8B", "--predict", "runs.csv", "--out", "p.csv"), "--predict takes --out and nothing else"),
        (("plan", "--predict", "runs.csv", "--out", "p.csv", "--nodes", 2), "--predict takes --out and nothing else"),
        (("plan", "quickstart", "--nodes", 2), "add for example --cluster dgx-h100"),
        (("plan", "Llama3-8B", "--cluster", "dgx-h100:1", "--nodes", 2, "--global-batch", 8), "leave one of them out"),
        ((*LLAMA, "--sequence", "4x"), "is not a length"),
        ((*LLAMA, "--sequence", "0"), "no whole number of tokens"),
        ((*LLAMA, "--out", "plan.json"), "--out belongs to --predict"),
        ((*LLAMA, "--price-per-device-hour", 2), "--price-per-device-hour needs --tokens"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(call, words, sentence):
    result = call(*words)
    assert result.status == 2
    assert result.err.startswith("deepseek: ")
    assert result.err.count("\n") == 1
    assert sentence in result.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*LLAMA, "--max-step-time", "1ms"), "the fastest takes"),
        (("plan", "SC21-GPT-1008.0B", "--cluster", "dgx-a100", "--global-batch", 512), "it fits on"),
    ],
)
def test_what_nothing_meets_is_an_answer_and_no_wrong_usage(call, words, sentence):
    assert_one_sentence(call(*words), 1, sentence)


def test_a_plan_says_what_a_budget_of_tokens_takes(call):
    result = call(*LLAMA, "--tokens", "1T", "--price-per-device-hour", 2, "--json")
    values = json.loads(result.out)
    throughput, budget = values["throughput"], values["budget"]
    assert throughput["tokens_per_s"] == pytest.approx(64 * 8192 / values["best"]["step_time_s"])
    assert budget["days"] == pytest.approx(1e12 / throughput["tokens_per_s"] / 86400, rel=1e-5)
    assert budget["cost"] == pytest.approx(budget["days"] * 24 * 16 * 2)
    text = " ".join(call(*LLAMA, "--tokens", "1T").out.split())
    assert "64 of 8192 tokens" in text
    assert "10% kept free" in text
    assert "model FLOP/s utilization" in text


def test_some_memory_stays_free_unless_it_is_asked_for(call):
    plans = [json.loads(call(*LLAMA, "--headroom", share, "--json").out) for share in ("0.1", "0.0")]
    capacity = 80 * 2**30
    assert plans[0] == json.loads(call(*LLAMA, "--json").out)
    assert plans[0]["best"]["memory_bytes"] <= 0.9 * capacity
    assert plans[1]["num_fitting"] > plans[0]["num_fitting"]


def test_formats_and_kernels_are_those_that_the_devices_have_unless_asked_for(call):
    words = ("plan", "Llama3-8B", "--cluster", "dgx-1", "--global-batch", 64, "--json")
    old, asked = json.loads(call(*words).out), json.loads(call(*words, "--precision", "bf16").out)
    assert (old["best"]["plan"]["precision"], old["software"]["attention"]) == ("fp16", "flash")
    assert asked["best"]["plan"]["precision"] == "bf16"
    assert any("which has no bf16 units" in sentence for sentence in asked["assumptions"])


@pytest.mark.parametrize("name", ["Llama2-7B", "llama-7b", "llama-2-7b", "LLAMA2_7B"])
def test_a_model_has_one_entry_under_all_its_spellings(call, name):
    words = ("--cluster", "dgx-a100", "--global-batch", 16, "--json")
    assert call("plan", name, *words).out == call("plan", "Llama2-7B", *words).out
