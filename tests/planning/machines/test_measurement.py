import json

import pytest
import torch

from deepseek.core.errors import ConfigError, PermanentError
from deepseek.distributed.plan import Plan
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate.columns import describe_case, stack_cases
from deepseek.planning.estimate.compute import multiply_s
from deepseek.planning.machines import measurement
from deepseek.planning.machines.measurement import (
    SIZES,
    Measured,
    build_cluster,
    default_file,
    fit_depth,
    fit_link,
    measure_machine,
)
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.naming import cluster_from_dict, cluster_to_dict

LINK = LinkClass(2e-5, 4e9)
RATES = {"fp32": {256: 1e11, 1024: 1.6e11}, "bf16": {256: 3e11, 1024: 4e11}}
MEASURED = Measured("a box", RATES, 1e11, 2e10, 5e9, 3e-6, 8e9, LINK, 1, 4)


@pytest.fixture(scope="module")
def told():
    steps = []
    return measure_machine(repeats=1, on_progress=steps.append), steps


def test_this_machine_is_measured(told):
    measured, steps = told
    assert len(steps) == 5
    for rates in measured.matmul_flops.values():
        assert all(1e8 < rate < 1e15 for rate in rates.values())
    assert 1e8 < measured.memory_bandwidth_bytes_per_s < 1e14
    assert 0 <= measured.link.alpha_s < 0.1
    assert 1e6 < measured.link.bandwidth_bytes_per_s < 1e13
    cluster = build_cluster(measured)
    assert cluster_from_dict(json.loads(json.dumps(cluster_to_dict(cluster)))) == cluster


def test_prediction_starts_from_the_rates_that_were_measured():
    cluster = build_cluster(MEASURED)
    columns = stack_cases([describe_case(get_model_shape("Llama3-8B"), cluster, Plan(precision="bf16"), 1)])
    size = columns.hidden * 0 + 16384
    for depth, rate in RATES["bf16"].items():
        seconds = float(multiply_s(columns, size, size, size * 0 + depth)[0])
        assert 2 * 16384**2 * depth / seconds == pytest.approx(rate, rel=0.02)
    shares = cluster.accelerators[0].constants
    assert float((columns.memory_bandwidth * columns.memory_fraction)[0]) == pytest.approx(5e9)
    peak = float((columns.peak_flops_16 * columns.matmul_fraction)[0])
    assert peak * shares.attention_fraction == pytest.approx(1e11)
    assert shares.launch_s == 3e-6
    assert cluster.accelerators[0].scale_up == cluster.network == LINK


@pytest.mark.parametrize("rates", [{256: 2e11, 1024: 1.5e11}, {256: 1e11, 1024: 4.1e11}])
def test_rates_that_no_depth_explains_stay_what_they_are(rates):
    peak, depth = fit_depth(rates)
    assert depth == 0.0
    assert min(rates.values()) <= peak <= max(rates.values())


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


def test_what_takes_long_is_timed_once(monkeypatch):
    calls = []
    counted = {}
    for limit_s in (1e9, 0.0):
        monkeypatch.setattr(measurement, "LONG_S", limit_s)
        calls.clear()
        measurement.median_s(lambda: calls.append(1), torch.device("cpu"), 5)
        counted[limit_s] = len(calls)
    assert counted == {1e9: 6, 0.0: 1}


def test_after_a_matmul_that_takes_long_no_further_one_of_its_depth_is_timed(monkeypatch):
    asked, shapes = [], SIZES["cpu"].matmuls
    taken_s = {256: 0.5 * measurement.LONG_S, 1024: 3 * measurement.LONG_S}

    def rate(device, precision, shape, repeats):
        asked.append(shape)
        return 6 * shape[0] * shape[1] * shape[2] / taken_s[shape[2]]

    monkeypatch.setattr(measurement, "rate_matmul", rate)
    rates = measurement._rate_matmuls(torch.device("cpu"), "bf16", shapes, 5)
    assert tuple(asked) == shapes[:3] == ((2048, 256, 256), (2048, 1024, 256), (1024, 1024, 1024))
    assert rates == pytest.approx(
        {256: 6 * 256 * 2048 * (256 + 1024) / 2 / taken_s[256], 1024: 6 * 1024**3 / taken_s[1024]}
    )


def test_measurements_are_kept_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    assert default_file() == tmp_path / "cluster.json"
    monkeypatch.delenv("DEEPSEEK_CACHE_DIR")
    assert default_file().parts[-3:] == (".cache", "deepseek", "cluster.json")


def test_a_link_measured_beside_other_work_is_measured_again(monkeypatch):
    noisy, quiet = [(8, 2e-3), (1 << 20, 1e-3)], [(8, 1e-4), (1 << 20, 1e-3)]
    answers, asked = [noisy, quiet], []
    monkeypatch.setattr(measurement, "_exchange_messages", lambda repeats: asked.append(repeats) or answers.pop(0))
    assert measurement.measure_link() == fit_link(quiet) and asked == [15, 30]
    answers += [noisy] * 3
    with pytest.raises(PermanentError, match="quieter machine"):
        measurement.measure_link()


def test_on_a_gpu_what_is_timed_outlasts_the_launches_of_its_host():
    sizes, launches_s = SIZES["cuda"], 100e-6  # of a forward and backward pass through autograd
    flops, bytes_per_s = 2.5e15, 8e12  # of the fastest device there is
    assert all(3 * 2 * rows * columns * depth / flops > 1.5 * launches_s for rows, columns, depth in sizes.matmuls)
    sequences, heads, tokens, channels = sizes.attention
    assert 3.5 * 2 * sequences * heads * tokens**2 * channels / flops > 1.5 * launches_s
    assert 30 * sizes.elementwise[0] * sizes.elementwise[1] / bytes_per_s > 1.5 * launches_s
    assert 2 * sizes.moved_bytes / bytes_per_s > 1.5 * launches_s
    depths = {depth for _, _, depth in sizes.matmuls}
    assert max(depths) >= 4 * min(depths)
