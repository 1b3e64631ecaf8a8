import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepseek
from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import RECOMPUTATIONS, SCHEDULES, Plan
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate.step import predict
from deepseek.planning.feasibility import explain_misfit
from deepseek.planning.machines.cluster import Cluster, Node, get_accelerator
from deepseek.planning.models.model_shape import ModelShape, OperatorCost, OperatorList, get_model_shape
from deepseek.planning.search.estimates import BUSY_ITEMS, WAITING_POWER, Estimates, apply_limits
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Limits, Space

SMALL = ModelShape(layers=6, hidden=1024, heads=4, ffn=2816, vocabulary=8192, sequence=512, name="small")
EXPERTS = replace(SMALL, experts=4, top_k=2, name="experts")
LLAMA = get_model_shape("Llama3-8B")
GPT_1750B = replace(get_model_shape("SC21-GPT-1008.0B"), layers=224, name="GPT-1.75T")


def brute_force(model, cluster, batch, budget=None):
    """Every plan that `Plan` and `explain_misfit` accept, priced one by one."""
    devices = cluster.num_devices
    found = {}
    divisors = [each for each in range(1, devices + 1) if devices % each == 0]
    for tp, pp, cp in itertools.product(divisors, repeat=3):
        if devices % (tp * pp * cp):
            continue
        dp = devices // (tp * pp * cp)
        choices = itertools.product(
            range(1, batch + 1),
            (0, 1, 2, 3),
            RECOMPUTATIONS,
            SCHEDULES,
            range(1, model.layers + 1),
            range(1, 5),
            {1, tp},
        )
        for size, zero, again, schedule, chunks, ep, etp in choices:
            if not model.experts and ep * etp > 1:
                continue
            if (zero and dp * cp == 1) or (pp == 1 and schedule != "1f1b"):
                continue  # written in several ways, the same plan
            try:
                each = Plan(
                    tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, etp=etp, zero_stage=zero, recomputation=again,
                    micro_batch_size=size, schedule=schedule, virtual_stages=chunks, sequence_parallel=tp > 1,
                )  # fmt: skip
            except ConfigError:
                continue
            is_uneven = chunks == 1 and (schedule != "interleaved")
            if explain_misfit(each, model, cluster, batch, is_padding_layers=is_uneven) or has_empty_stage(each, model):
                continue
            if schedule == "interleaved" and chunks == 1:
                continue
            if (tp * cp * dp) % (ep * etp):
                continue
            priced = predict(model, cluster, each, batch, is_checked=False)
            if priced.memory_bytes <= (budget or cluster.accelerators[0].memory_bytes):
                found[each] = priced
    return found


def has_empty_stage(each, model):
    slots = -(-model.layers // each.pp)
    missing = slots * each.pp - model.layers
    return bool(missing) and -(-missing // 2) >= slots


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


def test_prices_are_those_of_predict():
    cluster = Cluster.of("H100-SXM-80GB", nodes=2)
    best = plan(LLAMA, cluster, global_batch=64).best
    alone = predict(LLAMA, cluster, best.plan, 64, is_checked=False)
    assert best.step_time_s == pytest.approx(alone.step_time_s)
    assert best.memory_bytes == pytest.approx(alone.memory_bytes)
    assert best.time_items_s == pytest.approx(alone.time_items_s)


def test_the_front_holds_exactly_what_nothing_beats():
    cluster = Cluster.of("A100-SXM-40GB", gpus_per_node=4)
    front = plan(SMALL, cluster, global_batch=4).front
    points = [(each.step_time_s, each.memory_bytes, each.energy_j) for each in front]
    for one, other in itertools.permutations(points, 2):
        assert not all(mine <= theirs for mine, theirs in zip(one, other, strict=True))
    least = min(each.memory_bytes for each in brute_force(SMALL, cluster, 4).values())
    assert min(each.memory_bytes for each in front) == pytest.approx(least)


def test_energy_is_the_power_limit_while_busy_and_a_share_of_it_while_waiting():
    cluster = Cluster.of("H100-SXM-80GB", nodes=2)
    best = plan(LLAMA, cluster, global_batch=64).best
    busy = sum(best.time_items_s[name] for name in BUSY_ITEMS)
    waiting = best.step_time_s - busy
    assert best.energy_j == pytest.approx(16 * 700 * (busy + WAITING_POWER * waiting))


@pytest.mark.parametrize("runner_up", plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32).runners_up[:4])
def test_a_runner_up_names_the_item_that_it_loses_most_in(runner_up):
    best = plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32).best
    items = runner_up.candidate.time_items_s
    losses = {name: value - best.time_items_s[name] for name, value in items.items()}
    assert runner_up.difference == pytest.approx(max(losses.values()))
    assert runner_up.item in runner_up.reason


def test_the_result_goes_into_json_and_counts_what_was_rejected():
    found = plan(LLAMA, Cluster.of("A100-SXM-40GB"), global_batch=32)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["best"]["plan"]["tp"] == found.best.plan.tp
    memory_rules = [count for rule, count in found.rejected_candidates.items() if rule.startswith("memory")]
    assert sum(memory_rules) + found.num_fitting == found.num_candidates
    assert any("power limit" in sentence for sentence in found.assumptions)


def test_a_space_narrows_the_choice():
    space = Space(tp=(2,), zero_stages=(1,), recomputations=("full",), micro_batch_sizes=(2,), schedules=("gpipe",))
    found = plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32, space=space)
    for each in (found.best, *(other.candidate for other in found.runners_up)):
        assert (each.plan.tp, each.plan.recomputation, each.plan.micro_batch_size) == (2, "full", 2)
        assert each.plan.schedule == "gpipe" or each.plan.pp == 1


def test_progress_reaches_the_total():
    told = []
    plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32, on_progress=lambda *each: told.append(each))
    assert told[-1][0] == told[-1][1] > 0


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


def test_a_million_candidates_take_seconds():
    cluster = Cluster.of("H100-SXM-80GB", nodes=2048)
    began_s = time.process_time()
    found = plan(get_model_shape("DeepSeek-V3"), cluster, global_batch=16384)
    took_s = time.process_time() - began_s
    assert found.num_candidates > 700_000
    assert took_s * 1e6 / found.num_candidates < 10


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


@pytest.mark.parametrize(
    ("model", "nodes", "remedy"),
    [
        (GPT_1750B, 4, "fits on 64 nodes of 8 A100-SXM-80GB"),
        (get_model_shape("Llama3-70B"), 1, "keep the optimizer in the host's memory"),
    ],
    ids=["nodes", "offloading"],
)
def test_a_model_that_fits_nowhere_is_told_what_would_help(model, nodes, remedy):
    with pytest.raises(ConfigError, match=remedy) as caught:
        plan(model, Cluster.of("A100-SXM-80GB", nodes=nodes), global_batch=512)
    assert "85.9 GB may be used" in str(caught.value)


def test_the_smallest_cluster_that_is_named_fits_and_the_one_before_does_not():
    model = get_model_shape("SC21-GPT-310.1B")
    with pytest.raises(ConfigError) as caught:
        plan(model, Cluster.of("A100-SXM-80GB", nodes=2), global_batch=1536)
    words = str(caught.value).split("fits on ")[1].split()
    nodes = int(words[0])
    assert plan(model, Cluster.of("A100-SXM-80GB", nodes=nodes), global_batch=1536).best
    with pytest.raises(ConfigError):
        plan(model, Cluster.of("A100-SXM-80GB", nodes=nodes - 1), global_batch=1536)


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (Limits(memory_headroom=0.9), "it fits without memory_headroom=0.9"),
        (Limits(max_step_time_s=1e-6), "the fastest takes"),
        (Limits(max_energy_j=1.0), "the thriftiest takes"),
    ],
    ids=["headroom", "time", "energy"],
)
def test_limits_that_nothing_meets_say_how_far_off_they_are(limits, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32, limits=limits)


def test_limits_that_contradict_each_other_are_named_together():
    rows = np.zeros((2, 13), np.int32)
    prices = Estimates(rows, np.array([1.0, 2.0]), np.array([1e9, 1e9]), np.array([500.0, 300.0]))
    kept = apply_limits(prices, Limits(max_step_time_s=2.0, max_energy_j=400.0), Counter())
    assert list(kept.seconds) == [2.0]
    with pytest.raises(ConfigError, match=r"can each be met, but not together; .* the fastest plan takes 2 s"):
        apply_limits(prices, Limits(max_step_time_s=1.5, max_energy_j=400.0), Counter())


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


def test_a_prime_number_of_devices_has_a_plan_if_the_batch_allows_it():
    cluster = Cluster.of("H100-SXM-80GB", gpus_per_node=7)
    assert plan(SMALL, cluster, global_batch=14).best.plan.dp == 7
    awkward = replace(SMALL, layers=5, sequence=512)
    with pytest.raises(ConfigError, match="choose a batch or a number of devices with common divisors"):
        plan(awkward, cluster, global_batch=8)


def test_nodes_without_a_network_between_them_are_refused():
    cluster = replace(Cluster.of("H100-SXM-80GB", nodes=2), network=None)
    with pytest.raises(ConfigError, match="have no network between them"):
        plan(SMALL, cluster, global_batch=16)


def test_an_energy_limit_needs_power_figures():
    with pytest.raises(ConfigError, match="needs power figures, and TPU-v5p has none"):
        plan(SMALL, Cluster.of("TPU-v5p"), global_batch=16, limits=Limits(max_energy_j=5.0))
    assert plan(SMALL, Cluster.of("TPU-v5p"), global_batch=16).best.energy_j is None


def test_planning_loads_no_torch():
    package = Path(deepseek.__file__).parent
    rooms = [path.relative_to(package.parent).with_suffix("") for path in (package / "planning").rglob("*.py")]
    names = [".".join(room.parts).removesuffix(".__init__") for room in rooms if room.stem != "from_module"]
    assert len(names) > 15
    imports = "; ".join(f"import {name}" for name in names)
    code = f"import sys, deepseek; {imports}; deepseek.plan, deepseek.Plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
