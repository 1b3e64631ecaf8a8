"""Plans on a screen: every number that is shown follows from the values that it is shown for."""

from __future__ import annotations

import dataclasses
import json

import pytest

from deepseek.bench.plan_trial import Checked
from deepseek.cli.screen.plans import (
    print_json,
    search,
    show_check,
    show_cluster,
    show_collectives,
    show_curve,
    show_result,
)
from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.machines.constants import get_constants
from deepseek.planning.machines.measured_collectives import MeasuredCollective
from deepseek.planning.models.model_shape import ModelShape, get_model_shape
from deepseek.planning.scaling import ScalingCurve
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Request
from deepseek.planning.search.results import PlanningResult
from deepseek.planning.search.throughput import Budget

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="module")
def request_() -> Request[ModelShape]:
    return Request(get_model_shape("Llama3-8B"), Cluster.of("A100-SXM-80GB", nodes=2), 64)


@pytest.fixture(scope="module")
def result(request_: Request[ModelShape]) -> PlanningResult:
    return search(request_)


def read_tables(text: str) -> dict[str, list[list[str]]]:
    """Rows by title: a line without a frame names the table that begins below it."""
    tables: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("│"):
            tables.setdefault(title, []).append([cell.strip() for cell in line.split("│")[1:-1]])
        elif line and line[0] not in "┏┡└┌├┃╇":
            title = line.strip()
    return tables


def test_a_search_from_the_screen_is_the_planner(request_: Request[ModelShape], result: PlanningResult) -> None:
    expected = plan(request_.model, request_.cluster, global_batch=request_.global_batch)
    assert result.best == expected.best
    assert result.front == expected.front
    assert result.assumptions == expected.assumptions


def test_items_are_sorted_and_sum_to_the_total(
    request_: Request[ModelShape], result: PlanningResult, capsys: Capture
) -> None:
    show_result(request_, result, top=2)
    tables = read_tables(capsys.readouterr().out)
    for title, items, factor in (
        ("Time of one step", result.best.time_items_s, 1e3),
        ("Memory of the fullest device", result.best.memory_items_bytes, 1e-9),
    ):
        *rows, total = tables[title]
        values = [float(value) for _, value, _ in rows]
        assert values == sorted(values, reverse=True)
        assert {name for name, _, _ in rows} == {name.replace("_", " ") for name, item in items.items() if item > 0}
        assert float(total[1]) == pytest.approx(factor * sum(items.values()), rel=1e-3)
        assert sum(float(share.rstrip("%")) for _, _, share in rows) == pytest.approx(100, abs=0.05 * len(rows))


def test_the_plan_its_runners_up_and_its_rejections_are_counted(
    request_: Request[ModelShape], result: PlanningResult, capsys: Capture
) -> None:
    show_result(request_, result, top=2, budget=Budget(2_000_000, 7, 1.25, 480.0, 1234.4))
    out = capsys.readouterr().out
    tables, best = read_tables(out), result.best.plan
    facts = dict(tables["The fastest plan"])
    assert facts["tensor x pipeline x data x context"] == f"{best.tp} x {best.pp} x {best.dp} x {best.cp}"
    assert facts["devices"] == "16" == str(best.tp * best.pp * best.dp * best.cp)
    assert facts["sequences of a step"] == f"64 of {request_.model.sequence} tokens"
    assert facts["2M tokens"] == "at least 1.2 days, 7 steps"
    assert facts["cost"] == "at least 1,234"
    runners = tables["Runners-up"]
    assert [row[-1] for row in runners] == [runner.reason for runner in result.runners_up[:2]]
    rejected = next(rows for title, rows in tables.items() if title.endswith("fit; rejected"))
    counted = {**result.rejected_layouts, **result.rejected_candidates}
    assert {name: int(count.split()[0]) for name, count in rejected} == counted
    for sentence in result.assumptions:
        assert f"{sentence}\n" in out


def test_energy_is_shown_in_the_largest_unit_that_it_fills(
    request_: Request[ModelShape], result: PlanningResult, capsys: Capture
) -> None:
    for energy_j, shown in (
        (None, "not known"),
        (12.0, "12 J"),
        (1500.0, "1.5 kJ"),
        (2e6, "2 MJ"),
        (3.25e9, "3.25 GJ"),
    ):
        best = dataclasses.replace(result.best, energy_j=energy_j)
        show_result(request_, dataclasses.replace(result, best=best), top=0)
        tables = read_tables(capsys.readouterr().out)
        assert dict(tables["The fastest plan"])["energy of a step"] == shown
        assert "Runners-up" not in tables


def test_a_search_that_rejected_nothing_says_so(
    request_: Request[ModelShape], result: PlanningResult, capsys: Capture
) -> None:
    show_result(request_, dataclasses.replace(result, rejected_layouts={}, rejected_candidates={}), top=1)
    tables = read_tables(capsys.readouterr().out)
    assert [["nothing", "0 plans"]] in tables.values()


def test_a_curve_is_shown_with_its_finding_and_assumptions(capsys: Capture) -> None:
    show_curve(
        ScalingCurve("x", "doubling doubles", ("nodes", "speed"), ((1, "1.0"), (2, 1.9)), "nearly", ("no skew",))
    )
    out = capsys.readouterr().out
    assert read_tables(out)["doubling doubles"] == [["1", "1.0"], ["2", "1.9"]]
    assert out.endswith("nearly\nno skew\n")


def test_a_measured_machine_is_shown_with_the_rates_that_its_shares_leave(capsys: Capture) -> None:
    link = LinkClass(2e-5, 3e9)
    shares = dataclasses.replace(
        get_constants("other"), attention_fraction=0.5, matmul_fraction=0.5, memory_fraction=0.25, launch_s=4e-6
    )
    device = Accelerator("a box", 16e9, 2e10, {"fp32": 5e10, "bf16": 1e11}, link, link, scale_up_size=1, shares=shares)
    show_cluster(Cluster((Node(device, 1),), link))
    facts = dict(read_tables(capsys.readouterr().out)["This machine"])
    assert facts["device"] == "1 x a box"
    assert facts["bf16 attention"].startswith("25")  # 1e11 x 0.5 x 0.5, in billions
    assert facts["elementwise kernels"] == "5 GB/s"
    assert facts["issuing a kernel"] == "4 us"
    assert facts["message between processes"] == "20 us"
    assert facts["link between processes"] == "3 GB/s"


def test_collectives_are_shown_in_milliseconds_beside_their_estimate(capsys: Capture) -> None:
    show_collectives([MeasuredCollective("all_reduce", 4, 1_000_000, 1_500_000, 6, 0.002, 0.005)])
    ((title, (row,)),) = read_tables(capsys.readouterr().out).items()
    assert title == "Collectives between 4 processes of this machine"
    assert row == ["all reduce", "1 MB", "1.5 MB", "2", "5", "2.5"]


def test_a_check_divides_predicted_by_measured_and_survives_no_memory(result: PlanningResult, capsys: Capture) -> None:
    title = "Predicted against measured, 5 steps"
    show_check(result, Checked(5, 0.3, 0.4, 3e9, 2e9))
    rows = read_tables(capsys.readouterr().out)[title]
    assert rows == [["step time", "300 ms", "400 ms", "0.75"], ["memory", "3 GB", "2 GB", "1.50"]]
    show_check(result, Checked(5, 0.3, 0.4, 3e9, 0.0))
    assert read_tables(capsys.readouterr().out)[title][1][-1] == "-"


def test_json_is_one_line(capsys: Capture) -> None:
    print_json({"b": [1, None], "a": "é\n"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"b": [1, None], "a": "é\n"}
