import json

import pytest

from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.machines.measured_collectives import MeasuredCollective
from tests.cli.commands import assert_one_sentence
from tests.cli.verbs.measured_machine import save_machine


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    save_machine(tmp_path)


def test_a_machine_that_was_never_measured_is_measured_first(call, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "empty"))
    link = LinkClass(1e-5, 1e9)
    measured = []

    def measure(path):
        measured.append(path)
        device = Accelerator("a box", 16e9, 2e10, {"fp32": 5e10, "bf16": 5e10}, link, link, processors=2)
        return Cluster((Node(device, 1),), link)

    monkeypatch.setattr("deepseek.cli.verbs.plan_measure.measure_to", lambda path: measure(path))
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
    monkeypatch.setattr("deepseek.cli.verbs.plan_measure.measure_to", lambda path: measured.append(path) or fresh)
    result = call("plan", "decoder_tiny", "--json")
    assert result.status == 0, result.err
    assert measured == [path]
    assert (
        "measuring again" in result.err
        and {"shares": "lacks the shares", "text": "no table"}.get(change, f"{change} was 'another'") in result.err
    )


def test_collectives_are_shown_beside_what_their_messages_should_take(call, tmp_path, monkeypatch):
    link = LinkClass(1e-5, 1e9)
    device = Accelerator("a box", 16e9, 2e10, {"fp32": 5e10, "bf16": 5e10}, link, link, processors=2)
    monkeypatch.setattr("deepseek.cli.verbs.plan_measure.measure_to", lambda path: Cluster((Node(device, 1),), link))
    row = MeasuredCollective("ring_all_reduce", 2, 4096, 4096, 2, 2.5e-5, 5e-5)
    monkeypatch.setattr(
        "deepseek.planning.machines.measured_collectives.measure_collectives", lambda world_size, link: (row,)
    )
    out = " ".join(call("plan", "measure", "--collectives", 2).out.split())
    assert "Collectives between 2 processes" in out
    assert "ring all" in out  # the name may be broken over lines
    assert "2.0" in out  # twice as long as estimated
    values = json.loads(call("plan", "measure", "--collectives", 2, "--json").out)
    assert values["collectives"][0]["measured_s"] == 5e-5
    assert values["network"]["alpha_s"] == 1e-5


def test_one_process_alone_exchanges_nothing(call, machine, monkeypatch):
    monkeypatch.setattr("deepseek.cli.verbs.plan_measure.measure_to", lambda path: Cluster.of("L4", gpus_per_node=1))
    assert_one_sentence(call("plan", "measure", "--collectives", 1), 2, "give 2 to 64")
