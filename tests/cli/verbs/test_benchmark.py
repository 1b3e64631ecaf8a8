"""`deepseek benchmark`: its options reach the comparison, its rows are shown and saved, and a regression fails it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deepseek.bench import comparison
from deepseek.bench.baselines import Row
from deepseek.bench.comparison import BenchConfig, Compared
from deepseek.bench.variants import Subject
from deepseek.core.events import Event
from tests.cli.commands import Result, assert_one_sentence

Call = Callable[..., Result]
FAST = Row("bf16", "inductor", "bf16", 1, 12.345, 13.0, 81.0, 2_500_000_000, 0.995, 0.99987, 0.7654)
REFUSED = Row("fp16", "inductor", "fp16", 1, note="needs a GPU")
ROWS = (FAST, REFUSED, replace(FAST, batch_size=16, latency_ms=100.0, note="slow start"))


class Comparing:
    """Stands for `compare`, which takes minutes: keeps what it was asked and gives rows."""

    def __init__(self) -> None:
        self.asked: list[tuple[BenchConfig, list[Subject]]] = []
        self.rows = ROWS

    def __call__(self, config: BenchConfig, subjects: Sequence[Subject]) -> Iterator[Event]:
        self.asked.append((config, list(subjects)))
        yield Compared(self.rows)


@pytest.fixture
def comparing(monkeypatch: pytest.MonkeyPatch) -> Comparing:
    comparing = Comparing()
    monkeypatch.setattr(comparison, "compare", comparing)
    return comparing


def test_options_reach_the_comparison(call: Call, comparing: Comparing, tmp_path: Path) -> None:
    words = ["--backends", "eager, inductor", "--precisions", "fp32,int8,", "--batch-sizes", "1, 16", "--rounds", "3"]
    assert call("benchmark", "resnet50", *words, "--time-budget", "5", "--data", tmp_path / "d.npz").status == 0
    ((config, subjects),) = comparing.asked
    assert config == BenchConfig(
        model="resnet50", batch_sizes=(1, 16), num_rounds=3, time_budget_s=5.0, data=str(tmp_path / "d.npz")
    )
    pairs = [(subject.backend, subject.precision) for subject in subjects]
    assert pairs == [("eager", "fp32"), ("eager", "int8"), ("inductor", "fp32"), ("inductor", "int8")]


def test_without_backends_generations_are_compared_in_their_order(call: Call, comparing: Comparing) -> None:
    call("benchmark", "resnet50", "--generations", "v3.1,v1.2")
    assert [subject.name for subject in comparing.asked[0][1]] == ["v3.1", "v1.2"]
    assert_one_sentence(call("benchmark", "resnet50", "--generations", "v9.9"), 2, "v9.9")


def test_each_batch_size_has_a_table_and_every_figure_its_unit(
    call: Call, comparing: Comparing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = call("benchmark", "resnet50").out
    first, second = out.index("resnet50, batch 1 "), out.index("resnet50, batch 16 ")
    (row,) = [line for line in out[first:second].splitlines() if "bf16" in line]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["bf16", "inductor", "bf16", "12.35 ms", "13.00 ms", "81.0", "2.5 GB", "99.5%", "0.9999", "76.54%"]
    (refused,) = [line for line in out[first:second].splitlines() if line.startswith("│ fp16")]
    assert [cell.strip() for cell in refused.split("│")[1:-1]] == ["fp16", "inductor", "fp16", *["-"] * 7]
    assert "fp16: needs a GPU\n" in out[first:second]
    assert "100.00 ms" in out[second:] and "bf16: slow start\n" in out[second:]


def test_json_ends_with_the_rows(call: Call, comparing: Comparing) -> None:
    assert call("benchmark", "resnet50", "--json").events[-1]["rows"] == json.loads(json.dumps(list(map(asdict, ROWS))))


def test_what_has_become_worse_than_the_baseline_fails_the_command(
    call: Call, comparing: Comparing, tmp_path: Path
) -> None:
    path = tmp_path / "baseline.json"
    assert call("benchmark", "resnet50", "--save-baseline", path).status == 0
    assert call("benchmark", "resnet50", "--against", path).status == 0
    comparing.rows = (replace(FAST, latency_ms=FAST.latency_ms * 1.15), *ROWS[1:])  # type: ignore[operator]
    worse = call("benchmark", "resnet50", "--against", path)
    assert worse.status == 1
    assert worse.err == "deepseek: bf16, batch 1: latency_ms was 12.35 and is 14.2\n"
    assert call("benchmark", "resnet50", "--against", path, "--tolerance", "0.2").status == 0
    other = call("benchmark", "resnet18", "--against", path)
    assert other.status == 2
    assert "is the baseline of resnet50 and resnet18 was measured" in other.err


@pytest.mark.parametrize("sizes", ["1,two", "1.5", "-1"])
def test_a_batch_size_that_is_no_whole_number_is_one_sentence(call: Call, comparing: Comparing, sizes: str) -> None:
    assert_one_sentence(call("benchmark", "resnet50", f"--batch-sizes={sizes}"), 2, "--batch-sizes", "1,16")
    assert comparing.asked == []
