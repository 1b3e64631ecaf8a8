import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Cluster, get_accelerator, load_accelerators


def test_an_unknown_accelerator_names_the_nearest_known_one():
    with pytest.raises(ConfigError, match="did you mean 'H100-SXM-80GB'"):
        get_accelerator("H100-SMX-80GB")


def test_every_accelerator_has_what_a_prediction_needs():
    for accelerator in load_accelerators().values():
        assert accelerator.memory_bytes > 1e9
        assert accelerator.memory_bandwidth_bytes_per_s > 1e11
        assert accelerator.get_peak_flops("bf16") > 1e12
        assert accelerator.network.bandwidth_bytes_per_s > 0


def test_a_precision_that_a_device_lacks_runs_at_its_16_bit_rate():
    device = get_accelerator("A100-SXM-80GB")
    assert device.get_peak_flops("fp8") == device.get_peak_flops("bf16") == 312e12
    assert get_accelerator("V100-SXM-32GB").get_peak_flops("bf16") == 125e12


def test_a_rack_wide_switch_makes_one_domain_of_many_boxes():
    assert Cluster.of("GB200", nodes=16, gpus_per_node=4).scale_up_size == 64
    assert Cluster.of("GB200", nodes=64, gpus_per_node=4).scale_up_size == 72
    assert Cluster.of("H100-SXM-80GB", nodes=16).scale_up_size == 8


def test_joined_clusters_have_the_slower_of_each():
    mixed = Cluster.of("H100-SXM-80GB", nodes=2).join(Cluster.of("A100-SXM-80GB", nodes=1, gpus_per_node=4))
    assert (mixed.num_devices, mixed.gpus_per_node, mixed.is_uniform) == (20, 4, False)
    assert mixed.network.bandwidth_bytes_per_s == 25e9
    assert mixed.scale_up.bandwidth_bytes_per_s == 300e9
    assert [each.name for each in mixed.accelerators[14:18]] == ["H100-SXM-80GB"] * 2 + ["A100-SXM-80GB"] * 2


@pytest.mark.parametrize("name", ["nodes", "gpus_per_node"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_an_impossible_count_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Cluster.of("A100-SXM-80GB", **{name: value})


@pytest.mark.parametrize(("alpha", "bandwidth"), [(1e-6, 0.0), (1e-6, -1.0), (-1e-6, 1e9), (1e-6, float("nan"))])
def test_a_link_without_speed_is_refused(alpha, bandwidth):
    with pytest.raises(ConfigError, match="cannot carry a message"):
        LinkClass(alpha, bandwidth)
