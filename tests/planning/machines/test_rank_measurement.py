import json

import numpy as np
import pytest
from scipy.optimize import nnls

from deepseek.core.errors import ConfigError, PermanentError
from deepseek.planning.machines.rank_measurement import (
    CollectiveTime,
    MeasuredRanks,
    build_rank_cluster,
    fit_all_reduces,
    measure_ranks,
)
from deepseek.planning.naming import cluster_to_dict

SIZES = [(size, num_bytes) for size in (2, 4) for num_bytes in (64, 1 << 16, 1 << 22)]


def take(size, num_bytes, start_s=2e-4, alpha_s=3e-5, bandwidth=5e8):
    return start_s + 2 * (size - 1) * (alpha_s + num_bytes / size / bandwidth)


def test_start_and_link_are_found_again():
    start_s, link = fit_all_reduces([CollectiveTime(*row, take(*row)) for row in SIZES])
    assert start_s == pytest.approx(2e-4)
    assert (link.alpha_s, link.bandwidth_bytes_per_s) == pytest.approx((3e-5, 5e8))


@pytest.mark.parametrize("seed", range(5))
def test_noisy_times_are_fitted_as_by_scipy_without_negative_parts(seed):
    noise = np.random.default_rng(seed).uniform(0.6, 1.6, len(SIZES))
    times = [CollectiveTime(*row, take(*row) * factor) for row, factor in zip(SIZES, noise, strict=True)]
    rows = np.array([[1.0, 2 * (t.size - 1), 2 * (t.size - 1) / t.size * t.num_bytes] for t in times])
    expected, _ = nnls(rows / np.array([[t.seconds] for t in times]), np.ones(len(times)))
    start_s, link = fit_all_reduces(times)
    assert (start_s, link.alpha_s, 1 / link.bandwidth_bytes_per_s) == pytest.approx(tuple(expected), abs=1e-12)


def test_buffers_that_get_faster_with_size_are_no_measurement():
    with pytest.raises(PermanentError, match="measure on a quieter machine"):
        fit_all_reduces([CollectiveTime(2, 8, 2e-3), CollectiveTime(2, 1 << 22, 1e-3)])


@pytest.mark.parametrize("num_ranks", [0, 1, 65])
def test_one_rank_shares_nothing(num_ranks):
    with pytest.raises(ConfigError, match="give 2 to 64"):
        measure_ranks(num_ranks)


def test_ranks_of_this_machine_are_measured_together():
    measured = measure_ranks(2)
    cluster = build_rank_cluster(measured, num_cores=1)
    device = cluster.accelerators[0]
    assert (cluster.num_devices, cluster.num_cores, cluster.scale_up_size) == (2, 1, 2)
    assert 1e7 < device.get_peak_flops("fp32") < 1e14
    assert 1e6 < cluster.scale_up.bandwidth_bytes_per_s < 1e13
    assert 0 <= device.constants.collective_s < 0.1 and 0 <= device.constants.exposed_fraction <= 1
    assert {time.size for time in measured.all_reduces} == {2}
    assert json.loads(json.dumps(cluster_to_dict(cluster)))["num_cores"] == 1


def test_shares_are_those_that_were_measured():
    times = tuple(CollectiveTime(*row, take(*row)) for row in SIZES)
    cluster = build_rank_cluster(MeasuredRanks(4, {256: 1e10, 1024: 1e10}, 5e9, 4e9, 1e9, 1e-5, 0.9, 7e6, times), 2)
    shares = cluster.accelerators[0].constants
    assert (shares.attention_fraction, shares.memory_fraction, shares.launch_s) == (0.5, 0.25, 1e-5)
    assert (shares.exposed_fraction, shares.communicator_bytes) == (0.9, 7e6)
    assert shares.collective_s == pytest.approx(2e-4)
