import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepseek
from deepseek.core.errors import ConfigError
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate.step import predict
from deepseek.planning.machines.cluster import Cluster, Node, get_accelerator
from deepseek.planning.models.model_shape import OperatorCost, OperatorList, get_model_shape
from deepseek.planning.naming import read_config
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Limits
from tests.planning.search.brute_force import EXPERTS, SMALL, brute_force

LLAMA = get_model_shape("Llama3-8B")
GPT_1750B = replace(get_model_shape("SC21-GPT-1008.0B"), layers=224, name="GPT-1.75T")


@pytest.mark.parametrize(
    ("model", "gpus", "batch"), [(SMALL, 4, 8), (SMALL, 6, 12), (EXPERTS, 4, 2)], ids=["4", "6", "experts"]
)
def test_the_search_finds_what_brute_force_finds(model, gpus, batch):
    cluster = Cluster.of("A100-SXM-40GB", gpus_per_node=gpus)
    priced = brute_force(model, cluster, batch)
    seconds = sorted(each.step_time_s for each in priced.values())
    found = plan(model, cluster, global_batch=batch)
    assert found.best.step_time_s == pytest.approx(seconds[0], rel=1e-12)
    fitting = [plan_ for plan_ in priced if plan_.schedule != "gpipe"]  # 1f1b beside it takes no longer and no more
    assert found.num_fitting == len(fitting)
    assert found.best.plan in priced
    assert [each.candidate.step_time_s for each in found.runners_up] == sorted(
        each.candidate.step_time_s for each in found.runners_up
    )


def test_the_search_under_tight_memory_finds_what_brute_force_finds():
    cluster = Cluster.of("A100-SXM-40GB", gpus_per_node=4)
    priced = brute_force(SMALL, cluster, 4)
    sizes = sorted(each.memory_bytes for each in priced.values())
    budget = sizes[len(sizes) // 10]
    fitting = [
        each.step_time_s for plan_, each in priced.items() if each.memory_bytes <= budget and plan_.schedule != "gpipe"
    ]
    headroom = 1 - (budget + 1) / cluster.accelerators[0].memory_bytes
    found = plan(SMALL, cluster, global_batch=4, limits=Limits(memory_headroom=headroom))
    assert found.best.step_time_s == pytest.approx(min(fitting))
    assert found.num_fitting == len(fitting)
    assert found.best.step_time_s > min(each.step_time_s for each in priced.values())


def test_a_plan_that_just_fits_is_found():
    cluster = Cluster.of("A100-SXM-40GB", gpus_per_node=1)
    least = min(each.memory_bytes for each in plan(SMALL, cluster, global_batch=2).front)
    for spare, fits in ((1e3, True), (-1e3, False)):
        limits = Limits(memory_headroom=1 - (least + spare) / cluster.accelerators[0].memory_bytes)
        if fits:
            assert plan(SMALL, cluster, global_batch=2, limits=limits).num_fitting == 1
        else:
            with pytest.raises(ConfigError, match="does not fit"):
                plan(SMALL, cluster, global_batch=2, limits=limits)


def test_gpipe_is_never_better_than_the_plan_that_replaces_it():
    cluster = Cluster.of("A100-SXM-40GB", gpus_per_node=4)
    for each, priced in brute_force(SMALL, cluster, 4).items():
        if each.schedule == "gpipe":
            other = predict(SMALL, cluster, replace(each, schedule="1f1b"), 4, is_checked=False)
            assert other.step_time_s <= priced.step_time_s
            assert other.memory_bytes <= priced.memory_bytes


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.0, 0.9), more=st.floats(1.0, 4.0))
def test_more_memory_never_makes_the_best_plan_slower(share, more):
    device = replace(get_accelerator("A100-SXM-40GB"), memory_bytes=(1 - share) * 40e9)
    larger = replace(device, memory_bytes=more * device.memory_bytes)
    seconds = [best_time(Cluster.of(each, gpus_per_node=4)) for each in (device, larger)]
    assert seconds[1] <= seconds[0]


@settings(max_examples=15, deadline=None)
@given(nodes=st.sampled_from([1, 2, 4]), gbit=st.floats(5, 400), which=st.sampled_from(["network", "scale_up"]))
def test_doubling_a_bandwidth_never_makes_the_best_plan_slower(nodes, gbit, which):
    device = get_accelerator("A100-SXM-80GB")
    slow = Cluster.of(device, nodes=nodes, gpus_per_node=4, network_gbit_per_s=gbit)
    if which == "network":
        fast = Cluster.of(device, nodes=nodes, gpus_per_node=4, network_gbit_per_s=2 * gbit)
    else:
        link = LinkClass(device.scale_up.alpha_s, 2 * device.scale_up.bandwidth_bytes_per_s)
        fast = replace(slow, nodes=(Node(replace(device, scale_up=link), 4),) * nodes)
    assert best_time(fast) <= best_time(slow) * (1 + 1e-12)


def best_time(cluster, model=SMALL, batch=16):
    try:
        return plan(model, cluster, global_batch=batch).best.step_time_s
    except ConfigError:
        return float("inf")


def test_most_of_a_million_candidates_are_estimated_in_a_few_tables_or_not_at_all():
    """What it takes is in `benchmarks/planner_search.py`; here, what is evaluated is counted."""
    steps = []
    model, cluster = get_model_shape("DeepSeek-V3"), Cluster.of("H100-SXM-80GB", nodes=2048)
    found = plan(model, cluster, global_batch=16384, on_progress=lambda done, total: steps.append((done, total)))
    dropped = found.rejected_candidates["memory: weights, gradients and optimizer alone"]
    estimated = found.num_fitting + found.rejected_candidates["memory: with activations and buffers"]
    assert found.num_candidates > 700_000
    assert dropped + estimated == found.num_candidates
    assert dropped > found.num_candidates / 3  # families whose state alone does not fit: no row is made of them
    assert steps[0][0] > dropped
    assert steps[-1] == (found.num_candidates, found.num_candidates)
    assert len(steps) <= 10  # calls of the model of time, which takes tables of some ten thousand rows


def test_1750_billion_parameters_have_a_plan_on_1024_devices():
    found = plan(GPT_1750B, Cluster.of("A100-SXM-80GB", nodes=128), global_batch=2048)
    assert GPT_1750B.num_parameters == pytest.approx(1.75e12, rel=0.02)
    assert found.best.plan.tp * found.best.plan.pp >= 256
    assert found.best.memory_bytes < 80 * 2**30


def test_a_traced_network_gets_data_parallelism():
    operators = OperatorList("net", tuple(OperatorCost(str(i), 1e9, 1e6, 10**6, 1e6) for i in range(10)))
    found = plan(operators, Cluster.of("V100-SXM-16GB"), global_batch=64)
    assert found.best.plan.dp == 8
    assert found.num_candidates == 4 * 3
    with pytest.raises(ConfigError, match="choose a multiple of 8"):
        plan(operators, Cluster.of("V100-SXM-16GB"), global_batch=20)


def test_planning_loads_no_torch():
    package = Path(deepseek.__file__).parent
    rooms = [path.relative_to(package.parent).with_suffix("") for path in (package / "planning").rglob("*.py")]
    names = [".".join(room.parts).removesuffix(".__init__") for room in rooms if room.stem != "from_module"]
    assert len(names) > 15
    imports = "; ".join(f"import {name}" for name in names)
    code = f"import sys, deepseek; {imports}; deepseek.plan, deepseek.Plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_decoder_that_carries_its_configuration_is_planned_as_its_shape():
    from deepseek.models.decoder.model import Decoder, DecoderConfig

    config = DecoderConfig(vocab_size=512, num_layers=2, hidden_size=64, num_heads=4, max_length=128)
    cluster = Cluster.of("A100-SXM-40GB", gpus_per_node=2)
    found = plan(Decoder(config), cluster, global_batch=8)
    assert found.best.plan == plan(read_config(config.to_dict()), cluster, global_batch=8).best.plan
