import csv
import json
from xml.etree import ElementTree

import pytest

from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.machines.constants import get_constants
from deepseek.planning.machines.measurement import describe_surroundings
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.naming import save_cluster
from deepseek.planning.search.planner import plan
from tests.cli.commands import assert_one_sentence

LLAMA = ("plan", "Llama3-8B", "--cluster", "dgx-a100", "--nodes", 2, "--global-batch", 64)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """This machine, as if it had been measured."""
    link = LinkClass(1e-5, 1e9)
    device = Accelerator(
        "a box", 16e9, 2e10, {"fp32": 5e10, "bf16": 1e11}, link, link, scale_up_size=1, processors=2,
        shares=get_constants("other"),
    )  # fmt: skip
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    measured_on = describe_surroundings()
    save_cluster(Cluster((Node(device, 1),), link), tmp_path / "cluster.json", measured_on=measured_on)


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


def test_a_machine_that_was_never_measured_is_measured_first(call, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "empty"))
    link = LinkClass(1e-5, 1e9)
    measured = []

    def measure(path):
        measured.append(path)
        device = Accelerator("a box", 16e9, 2e10, {"fp32": 5e10, "bf16": 5e10}, link, link, processors=2)
        return Cluster((Node(device, 1),), link)

    monkeypatch.setattr("deepseek.cli.verbs.plan._measure_to", lambda path: measure(path))
    assert call("plan", "decoder_tiny", "--precision", "fp32").status == 0
    assert measured == [tmp_path / "empty" / "cluster.json"]


@pytest.mark.parametrize("change", ["processor_generation", "torch", "shares", "text"])
def test_a_measurement_of_another_machine_or_an_older_form_is_not_used(call, machine, tmp_path, monkeypatch, change):
    path = tmp_path / "cluster.json"
    values = json.loads(path.read_text())
    if change == "shares":
        values["accelerators"][0]["shares"] = None
    elif change != "text":
        values["measured_on"][change] = "another"
    path.write_text("[1]" if change == "text" else json.dumps(values), encoding="utf-8")
    fresh, measured = Cluster.of("L40S", nodes=1, gpus_per_node=1), []
    monkeypatch.setattr("deepseek.cli.verbs.plan._measure_to", lambda path: measured.append(path) or fresh)
    result = call("plan", "decoder_tiny", "--json")
    assert result.status == 0, result.err
    assert measured == [path]
    assert (
        "measuring again" in result.err
        and {"shares": "lacks the shares", "text": "no table"}.get(change, f"{change} was 'another'") in result.err
    )


def test_check_holds_predicted_against_measured(call, machine, corpus, monkeypatch):
    from deepseek.recipes import load_recipe

    small = load_recipe("decoder_tiny").override(
        {
            "model": {"vocab_size": 300, "num_layers": 1, "hidden_size": 32, "num_heads": 2, "max_length": 64},
            "data": {"sources": [str(corpus)], "heldout_fraction": 0.2, "vocab_size": 300, "sequence_length": 32,
                     "batch_size": 4},
        }
    )  # fmt: skip
    monkeypatch.setattr("deepseek.recipes.load_recipe", lambda name: small)
    values = json.loads(call("plan", "decoder_tiny", "--check", "--steps", 6, "--json").out)
    assert values["num_steps"] == 6
    assert values["measured_s"] > 0
    assert values["measured_bytes"] >= 0
    assert values["time_ratio"] == pytest.approx(values["predicted_s"] / values["measured_s"])


def test_runs_are_predicted_into_a_file(call, tmp_path):
    runs = tmp_path / "runs.csv"
    runs.write_text("model,gpu,n_gpus,tp,pp,gbs,mbs,seq\nLlama3-8B,H100,8,2,1,16,1,8192\n", encoding="utf-8")
    out = tmp_path / "predicted.csv"
    assert call("plan", "--predict", runs, "--out", out).status == 0
    with out.open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert "predicted_iter_time_s" in row
    assert "note" in row


def test_a_scaling_curve_prints_its_assumptions(call):
    result = call("plan", "--scaling", "hierarchical-all-reduce")
    assert result.status == 0
    assert "predicted:" in result.out
    assert "latencies" in result.out
    assert json.loads(call("plan", "--scaling", "bert-large", "--json").out)["name"] == "bert-large"


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
        ((*LLAMA, "--check"), "give a recipe (quickstart) and no --cluster"),
        (("plan", "--predict", "runs.csv"), "--out is missing"),
        (("plan", "--scaling", "strong"), "unknown scaling curve"),
        (("plan", "SC21-GPT-1008.0B", "--cluster", "dgx-a100", "--global-batch", 512), "it fits on"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(call, words, sentence):
    result = call(*words)
    assert result.status == 2
    assert result.err.startswith("deepseek: ")
    assert result.err.count("\n") == 1
    assert sentence in result.err


def test_too_few_steps_to_check_are_refused(call, machine):
    result = call("plan", "quickstart", "--check", "--steps", 2)
    assert_one_sentence(result, 2, "give at least 4")
