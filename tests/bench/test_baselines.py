import json
from dataclasses import replace

import pytest

from deepseek.bench.baselines import Row, find_regressions, save_baseline
from deepseek.core.errors import ConfigError, StorageError

HERE, ELSEWHERE = {"processor": "A"}, {"processor": "B"}
EAGER = Row("v1.2", "eager", "fp32", 1, latency_ms=80.0, memory_bytes=1000, agreement=1.0, accuracy=0.95)
FAST = Row("v5.0", "auto", "auto", 1, latency_ms=10.0, memory_bytes=500, agreement=0.99, accuracy=0.94)


@pytest.fixture
def baseline(tmp_path):
    path = tmp_path / "baseline.json"
    save_baseline(path, [EAGER, FAST], model="resnet50", machine=HERE)
    return path


def compare(path, rows, *, machine=HERE, model="resnet50", tolerance=0.1):
    return find_regressions(path, rows, model=model, machine=machine, tolerance=tolerance)


def test_the_same_rows_are_no_regression(baseline):
    assert compare(baseline, [EAGER, FAST]) == []


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        ({"latency_ms": 11.1}, "latency_ms"),
        ({"memory_bytes": 560}, "memory_bytes"),
        ({"agreement": 0.88}, "agreement"),
        ({"accuracy": 0.8}, "accuracy"),
    ],
)
def test_each_figure_that_is_worse_by_more_than_the_tolerance_is_named(baseline, change, figure):
    (found,) = compare(baseline, [EAGER, replace(FAST, **change)])
    assert (found.name, found.figure) == ("v5.0", figure)
    assert str(found).startswith(f"v5.0, batch 1: {figure} was")


def test_within_the_tolerance_nothing_is_said(baseline):
    assert compare(baseline, [EAGER, replace(FAST, latency_ms=10.9, memory_bytes=540, agreement=0.95)]) == []


def test_on_another_machine_the_speed_over_the_first_row_counts(baseline):
    slower = [replace(EAGER, latency_ms=160.0), replace(FAST, latency_ms=20.0, memory_bytes=9999)]
    assert compare(baseline, slower, machine=ELSEWHERE) == []
    (found,) = compare(baseline, [slower[0], replace(FAST, latency_ms=40.0)], machine=ELSEWHERE)
    assert (found.figure, found.before, found.now) == ("speed over the first row", 8.0, 4.0)


def test_a_row_that_no_longer_runs_is_a_regression(baseline):
    (found,) = compare(baseline, [EAGER, Row("v5.0", "auto", "auto", 1, note="no compiler")])
    assert found.now == float("inf")


def test_a_row_or_a_batch_size_that_is_new_has_nothing_to_be_compared_with(baseline):
    assert compare(baseline, [replace(FAST, name="new"), replace(FAST, batch_size=16, latency_ms=999.0)]) == []


def test_a_file_that_is_no_baseline_is_refused(tmp_path):
    for content in ("not json", "[]", "{}", json.dumps({"schema": 1, "model": "m", "machine": {}, "rows": [{"a": 1}]})):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ConfigError, match="not a baseline"):
            compare(tmp_path / "x.json", [EAGER])


def test_a_baseline_of_another_model_or_schema_is_refused(baseline):
    with pytest.raises(ConfigError, match="baseline of resnet50"):
        compare(baseline, [EAGER], model="gpt2")
    baseline.write_text(baseline.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ConfigError, match="schema 2"):
        compare(baseline, [EAGER])


def test_a_missing_baseline_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        compare(tmp_path / "none.json", [EAGER])
