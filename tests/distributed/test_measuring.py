import json

import pytest

from deepseek.core.errors import ConfigError, PermanentError
from deepseek.distributed.cluster import LinkClass
from deepseek.distributed.columns import describe_case, stack_cases
from deepseek.distributed.constants import get_constants
from deepseek.distributed.cost import multiply_s
from deepseek.distributed.finding import cluster_from_dict, cluster_to_dict
from deepseek.distributed.measuring import Measured, default_file, fit_link, make_cluster, measure_machine
from deepseek.distributed.model_shape import get_model_shape
from deepseek.distributed.plan import Plan

LINK = LinkClass(2e-5, 4e9)
MEASURED = Measured("a box", {"fp32": {"a": 1e11, "b": 3e11}, "bf16": {"a": 4e11}}, 2e10, 8e9, LINK, 1, 4)


@pytest.fixture(scope="module")
def told():
    steps = []
    return measure_machine(repeats=1, on_progress=steps.append), steps


def test_this_machine_is_measured(told):
    measured, steps = told
    assert len(steps) == 4
    for rates in measured.matmul_flops.values():
        assert all(1e8 < rate < 1e15 for rate in rates.values())
    assert 1e8 < measured.memory_bandwidth_bytes_per_s < 1e14
    assert 0 <= measured.link.alpha_s < 0.1
    assert 1e6 < measured.link.bandwidth_bytes_per_s < 1e13
    cluster = make_cluster(measured)
    assert cluster_from_dict(json.loads(json.dumps(cluster_to_dict(cluster)))) == cluster


def test_prediction_starts_from_the_rates_that_were_measured():
    shares = get_constants("other")
    device = make_cluster(MEASURED).accelerators[0]
    assert device.peak_flops["fp32"] * shares.matmul_fraction == pytest.approx(2e11)
    assert device.memory_bandwidth_bytes_per_s * shares.memory_fraction == pytest.approx(2e10)
    columns = stack_cases(
        [describe_case(get_model_shape("Llama3-8B"), make_cluster(MEASURED), Plan(precision="fp32"), 1)]
    )
    size = columns.hidden * 0 + 16384
    seconds = float(multiply_s(columns, size, size, size)[0])
    assert 2 * 16384**3 / seconds == pytest.approx(2e11, rel=0.05)


def test_a_line_through_messages_is_found_again():
    times = [(size, LINK.send_s(size)) for size in (8, 65536, 1 << 20, 1 << 22)]
    found = fit_link(times)
    assert found.alpha_s == pytest.approx(LINK.alpha_s)
    assert found.bandwidth_bytes_per_s == pytest.approx(LINK.bandwidth_bytes_per_s)


def test_messages_that_get_faster_with_size_are_no_measurement():
    with pytest.raises(PermanentError, match="measure on a quieter machine"):
        fit_link([(8, 2e-3), (1 << 20, 1e-3)])


def test_nothing_is_measured_without_repeats():
    with pytest.raises(ConfigError, match="give at least 1"):
        measure_machine(repeats=0)


def test_measurements_are_kept_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    assert default_file() == tmp_path / "cluster.json"
    monkeypatch.delenv("DEEPSEEK_CACHE_DIR")
    assert default_file().parts[-3:] == (".cache", "deepseek", "cluster.json")
