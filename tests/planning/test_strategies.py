import pytest

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Space
from deepseek.planning.strategies import (
    AutoParallel,
    HybridParallel,
    keep_devices,
    read_device_map,
    read_strategy,
    resolve_strategy,
)

LLAMA = get_model_shape("Llama3-8B")
CLUSTER = Cluster.of("A100-SXM-80GB", nodes=2)


def test_auto_parallel_is_the_planners_best_plan():
    chosen = resolve_strategy({"type": "AutoParallel"}, LLAMA, CLUSTER, global_batch=64)
    assert chosen == plan(LLAMA, CLUSTER, global_batch=64).best.plan
    assert chosen == resolve_strategy(AutoParallel(), LLAMA, CLUSTER, global_batch=64)


def test_hybrid_parallel_keeps_what_is_said_and_searches_the_rest():
    strategy = {"type": "HybridParallel", "tensorParallel": 4, "pipelineParallel": 4}
    chosen = resolve_strategy(strategy, LLAMA, CLUSTER, global_batch=64)
    assert (chosen.tp, chosen.pp, chosen.dp * chosen.cp) == (4, 4, 1)
    assert chosen == resolve_strategy(HybridParallel(4, 4), LLAMA, CLUSTER, global_batch=64)
    best = plan(LLAMA, CLUSTER, global_batch=64, space=Space(tp=(4,), pp=(4,))).best.plan
    assert chosen == best


def test_a_third_generation_config_means_the_same():
    config = {"model_parallel": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}}
    chosen = resolve_strategy(config, LLAMA, CLUSTER, global_batch=64)
    assert chosen == resolve_strategy(HybridParallel(4, 2), LLAMA, CLUSTER, global_batch=64)


def test_a_device_map_says_which_devices_the_plan_covers():
    config = {
        "model_parallel": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
        "device_map": {"gpu0": [0, 1, 2, 3], "gpu1": [4, 5, 6, 7]},
    }
    assert resolve_strategy(config, LLAMA, CLUSTER, global_batch=64).num_devices == 8
    assert [node.gpus for node in keep_devices(CLUSTER, (6, 7, 8)).nodes] == [2, 1]


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        ({}, "unknown strategy 'None'"),
        ({"type": "AutoParalel"}, "did you mean 'AutoParallel'"),
        ({"type": "AutoParallel", "tensorParallel": 2}, "chooses tensorParallel itself"),
        ({"type": "HybridParallel", "tensorParalel": 2}, "did you mean 'tensorParallel'"),
        ({"type": "HybridParallel", "tensorParallel": 0}, "tensorParallel=0 is not a positive whole number"),
        ({"type": "HybridParallel", "tensorParallel": 3}, "tp=3 = 3 does not divide the 16 devices"),
        ({"type": "HybridParallel", "tensorParallel": 8, "pipelineParallel": 4}, r"tp=8 \* pp=4 = 32 does not divide"),
        ({"model_parallel": 4}, "is not a table"),
        ({"model_parallel": {"tensor_size": 4}}, "unknown key of a strategy 'tensor_size'"),
        ({"model_parallel": {}, "device_mab": {}}, "unknown key of a strategy 'device_mab'"),
        ({"model_parallel": {}, "device_map": {"gpu0": [0, 99]}}, "names device 99 and the cluster has 16"),
    ],
)
def test_a_strategy_that_cannot_be_meant_is_refused(strategy, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve_strategy(strategy, LLAMA, CLUSTER, global_batch=64)


@pytest.mark.parametrize("devices", [[0, 0], [-1], ["a"], [True]])
def test_a_device_map_names_every_device_once(devices):
    with pytest.raises(ConfigError, match="give every device once"):
        read_device_map({"gpu0": devices})


def test_reading_a_strategy_searches_nothing():
    assert read_strategy({"type": "HybridParallel", "dataParallel": 2}) == HybridParallel(data_parallel=2)
