from dataclasses import replace

import pytest

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Limits, Request, Space
from tests.planning.search.brute_force import SMALL

LLAMA = get_model_shape("Llama3-8B")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"memory_headroom": 1.0}, "memory_headroom"),
        ({"memory_headroom": -0.1}, "memory_headroom"),
        ({"max_step_time_s": 0.0}, "max_step_time_s"),
        ({"max_energy_j": -1.0}, "max_energy_j"),
    ],
)
def test_limits_that_mean_nothing_are_refused(values, word):
    with pytest.raises(ConfigError, match=word):
        Limits(**values)


@pytest.mark.parametrize(
    "values",
    [{"tp": (0,)}, {"micro_batch_sizes": (True,)}, {"schedules": ("2f2b",)}, {"zero_stages": (4,)}, {"schedules": ()}],
)
def test_spaces_that_mean_nothing_are_refused(values):
    with pytest.raises(ConfigError):
        Space(**values)


@pytest.mark.parametrize("batch", [0, -8, True, 2.5])
def test_a_batch_that_is_no_number_of_sequences_is_refused(batch):
    with pytest.raises(ConfigError, match="positive number of sequences"):
        plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=batch)


def test_nodes_without_a_network_between_them_are_refused():
    cluster = replace(Cluster.of("H100-SXM-80GB", nodes=2), network=None)
    with pytest.raises(ConfigError, match="have no network between them"):
        plan(SMALL, cluster, global_batch=16)


def test_an_energy_limit_needs_power_figures():
    with pytest.raises(ConfigError, match="needs power figures, and TPU-v5p has none"):
        plan(SMALL, Cluster.of("TPU-v5p"), global_batch=16, limits=Limits(max_energy_j=5.0))
    assert plan(SMALL, Cluster.of("TPU-v5p"), global_batch=16).best.energy_j is None


def test_the_memory_budget_is_the_smallest_devices_share():
    mixed = Cluster.of("A100-SXM-80GB").join(Cluster.of("A100-SXM-40GB"))
    assert Request(LLAMA, mixed, 16, Limits(memory_headroom=0.25)).memory_budget_bytes == 30 * 2**30


def test_a_precision_that_nobody_computes_in_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        Space(precision="bf61")
