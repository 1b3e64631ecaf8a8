from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan
from deepseek.distributed.schedules import order_work
from deepseek.planning.estimate.columns import describe_case, spread_plans, stack_cases
from deepseek.planning.estimate.communication import form_group, reduce_scatter_s
from deepseek.planning.estimate.compute import time_layer
from deepseek.planning.estimate.step import TIME_ITEMS, _exposed, predict, predict_columns, predict_times
from deepseek.planning.machines.cluster import Cluster, get_accelerator
from deepseek.planning.machines.constants import get_constants
from deepseek.planning.machines.software import SOFTWARE, Software
from deepseek.planning.models.model_shape import ModelShape, OperatorCost, OperatorList, get_model_shape

SMALL = ModelShape(layers=8, hidden=1024, heads=16, ffn=4096, vocabulary=32000, sequence=1024)
SIZES = st.sampled_from([1, 2, 4])
PLANS = st.builds(
    lambda tp, pp, dp, mbs, recompute, zero: Plan(
        tp=tp, pp=pp, dp=dp, micro_batch_size=mbs, recomputation=recompute, zero_stage=zero if pp == 1 else min(zero, 1)
    ),
    SIZES, SIZES, SIZES, SIZES, st.sampled_from(["none", "selective", "full"]), st.integers(0, 3),
)  # fmt: skip


def cluster_for(plan, device="A100-SXM-80GB"):
    per_node = min(plan.num_devices, 8)
    return Cluster.of(device, nodes=plan.num_devices // per_node, gpus_per_node=per_node)


def scale_bandwidths(cluster, factor, kind):
    link = getattr(cluster, kind)
    faster = replace(link, bandwidth_bytes_per_s=factor * link.bandwidth_bytes_per_s)
    return replace(cluster, **{"network" if kind == "network" else "links": faster})


@given(PLANS, st.sampled_from(["network", "scale_up"]))
@settings(deadline=None, max_examples=60)
def test_doubling_a_bandwidth_never_slows_a_step(plan, kind):
    cluster = cluster_for(plan)
    faster = scale_bandwidths(cluster, 2.0, kind)
    batch = 4 * plan.dp * plan.micro_batch_size
    before = predict(SMALL, cluster, plan, batch).step_time_s
    assert predict(SMALL, faster, plan, batch).step_time_s <= before * (1 + 1e-12)


@given(PLANS)
@settings(deadline=None, max_examples=40)
def test_more_memory_changes_no_time_and_never_makes_a_plan_too_large(plan):
    device = get_accelerator("A100-SXM-40GB")
    larger = replace(device, memory_bytes=2 * device.memory_bytes)
    per_node = min(plan.num_devices, 8)
    nodes, batch = plan.num_devices // per_node, 4 * plan.dp * plan.micro_batch_size
    one, two = (
        predict(SMALL, Cluster.of(each, nodes=nodes, gpus_per_node=per_node), plan, batch) for each in (device, larger)
    )
    assert one.step_time_s == two.step_time_s
    assert one.is_out_of_memory or not two.is_out_of_memory


@given(PLANS)
@settings(deadline=None, max_examples=40)
def test_items_are_not_negative_and_add_up(plan):
    answer = predict(SMALL, cluster_for(plan), plan, 4 * plan.dp * plan.micro_batch_size)
    assert set(answer.time_items_s) == set(TIME_ITEMS)
    assert min(answer.time_items_s.values()) >= 0
    assert min(answer.memory_items_bytes.values()) >= 0
    assert answer.step_time_s == pytest.approx(sum(answer.time_items_s.values()))
    assert answer.memory_bytes == pytest.approx(sum(answer.memory_items_bytes.values()))


@given(st.lists(PLANS, min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_a_table_of_plans_gets_the_answers_of_single_plans(plans):
    batch = 64
    table = stack_cases([describe_case(SMALL, cluster_for(plan), plan, batch) for plan in plans])
    seconds, needed, _ = predict_columns(table)
    for index, plan in enumerate(plans):
        answer = predict(SMALL, cluster_for(plan), plan, batch)
        assert seconds[index] == pytest.approx(answer.step_time_s, rel=1e-12)
        assert needed[index] == pytest.approx(answer.memory_bytes, rel=1e-12)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(pp=4, tp=2),
        Plan(pp=4, tp=2, schedule="gpipe"),
        Plan(pp=4, tp=2, schedule="interleaved", virtual_stages=4),
        Plan(pp=2, tp=4, recomputation="full"),
    ],
)
def test_the_closed_form_equals_the_simulated_pipeline(plan):
    shape = replace(get_model_shape("Llama3-8B"), vocabulary=128)  # a head that weighs nothing: even stages
    answer = predict(shape, Cluster.of("H100-SXM-80GB"), plan, 16, has_timeline=True)
    once = answer.time_items_s["data_parallel"] + answer.time_items_s["optimizer"]
    assert answer.timeline.step_time_s == pytest.approx(answer.step_time_s - once, rel=2e-3)


def test_the_closed_form_follows_a_heavy_head_on_the_last_stage():
    answer = predict(get_model_shape("Llama3-8B"), Cluster.of("H100-SXM-80GB"), Plan(pp=8), 32, has_timeline=True)
    once = answer.time_items_s["data_parallel"] + answer.time_items_s["optimizer"]
    assert answer.timeline.step_time_s == pytest.approx(answer.step_time_s - once, rel=1e-9)
    assert answer.time_items_s["head"] > 0


def test_without_a_pipeline_there_is_no_timeline():
    assert predict(SMALL, Cluster.of("A100-SXM-80GB"), Plan(dp=8), 8, has_timeline=True).timeline is None


def test_an_operator_list_is_bound_by_operations_or_bytes():
    device = get_accelerator("A100-SXM-80GB")
    busy = OperatorList("busy", (OperatorCost("conv", 1e12, 1e6, 1000),))
    moving = OperatorList("moving", (OperatorCost("copy", 1e6, 1e10, 1000, is_matmul=False),))
    cluster = Cluster.of(device, gpus_per_node=1)
    assert predict(busy, cluster, Plan(), 1).step_time_s >= 3e12 / device.get_peak_flops("bf16")
    assert predict(moving, cluster, Plan(), 1).step_time_s >= 3e10 / device.memory_bandwidth_bytes_per_s
    kept = OperatorList("kept", (OperatorCost("conv", 1e9, 1e6, 1000, kept_bytes=1e9),))
    assert predict(kept, cluster, Plan(micro_batch_size=100), 100).is_out_of_memory


def test_sharded_weights_of_an_operator_list_travel_in_every_micro_batch():
    heavy = OperatorList("heavy", (OperatorCost("linear", 1e9, 1e6, 10**9),))
    cluster = Cluster.of("A100-SXM-80GB")
    link = cluster.scale_up.bandwidth_bytes_per_s
    passed = 7 / 8 * (2 + 2 + 4) * 1e9 / link  # gathered in 16 bits for both passes, gradients scattered in 32
    for count in (1, 3):
        items = predict(heavy, cluster, Plan(dp=8, zero_stage=3), 8 * count).time_items_s
        assert count * passed < items["sharded_weights"] < 2 * count * passed
        assert items["data_parallel"] == 0
    assert predict(heavy, cluster, Plan(dp=8, zero_stage=1), 8).time_items_s["sharded_weights"] == 0


def test_the_slowest_device_sets_the_pace():
    mixed = Cluster.of("H100-SXM-80GB").join(Cluster.of("A100-SXM-40GB"))
    slow = Cluster.of("A100-SXM-40GB", nodes=2)
    plan = Plan(dp=16)
    assert predict(SMALL, mixed, plan, 32).step_time_s > 0.8 * predict(SMALL, slow, plan, 32).step_time_s


def test_a_plan_that_cannot_run_is_refused_before_it_is_priced():
    with pytest.raises(ConfigError, match="does not fill the cluster"):
        predict(SMALL, Cluster.of("A100-SXM-80GB"), Plan(), 8)


def test_a_table_spread_over_one_model_gets_the_answers_of_single_plans():
    cluster = Cluster.of("A100-SXM-80GB")
    sizes = [(1, 1, 8), (2, 1, 4), (2, 2, 2), (4, 2, 1), (1, 8, 1)]
    varied = {name: np.array([float(size[place]) for size in sizes]) for place, name in enumerate(("tp", "pp", "dp"))}
    seconds, needed, _ = predict_columns(spread_plans(SMALL, cluster, Plan(micro_batch_size=2), 64, varied))
    for index, (tp, pp, dp) in enumerate(sizes):
        answer = predict(SMALL, cluster, Plan(tp=tp, pp=pp, dp=dp, micro_batch_size=2), 64)
        assert (seconds[index], needed[index]) == pytest.approx((answer.step_time_s, answer.memory_bytes), rel=1e-12)
    with pytest.raises(ConfigError, match="did you mean 'micro_batch_size'"):
        spread_plans(SMALL, cluster, Plan(), 64, {"micro_batches_size": np.ones(1)})


def test_a_hundred_thousand_plans_are_one_table():
    plans = [Plan(tp=tp, pp=pp, dp=8 // (tp * pp), micro_batch_size=1) for tp, pp in ((1, 1), (2, 1), (2, 2), (4, 2))]
    one = stack_cases([describe_case(SMALL, Cluster.of("A100-SXM-80GB"), plan, 64) for plan in plans])
    many = one.take(np.arange(100_000) % 4)
    assert sum(predict_times(many).values()).shape == (100_000,)


def test_hidden_communication_costs_its_exposed_share_and_the_rest_is_waited_for():
    c = stack_cases([describe_case(SMALL, Cluster.of("A100-SXM-80GB"), Plan(dp=8), 8)])
    share = float(c.exposed_fraction[0])
    assert _exposed(c, np.array([2.0]), np.array([10.0]))[0] == pytest.approx(share * 2.0)
    assert _exposed(c, np.array([10.0]), np.array([2.0]))[0] == pytest.approx(8.0 + share * 2.0)


def time_experts(*, ep, top_k, is_once, cluster=None):
    model = replace(get_model_shape("Mixtral-8x7B"), experts=64, top_k=top_k)
    software = Software(sends_tokens_once=is_once)
    plan = Plan(dp=ep, ep=ep, micro_batch_size=8)
    columns = stack_cases([describe_case(model, cluster or cluster_for(plan), plan, ep * 8, software)])
    free = columns.with_columns(collective_s=np.zeros(1), scale_up_alpha_s=np.zeros(1), network_alpha_s=np.zeros(1))
    return float(predict_times(free)["expert_parallel"][0])


def test_a_token_that_is_sent_once_costs_the_devices_it_reaches_and_not_its_experts():
    generator = np.random.default_rng(0)
    for ep, top_k in [(8, 8), (8, 2), (4, 6)]:
        reached = np.mean([len(set(generator.integers(ep, size=top_k))) for _ in range(20000)])
        share = time_experts(ep=ep, top_k=top_k, is_once=True) / time_experts(ep=ep, top_k=top_k, is_once=False)
        assert share == pytest.approx(reached / top_k, rel=0.01)


def test_between_nodes_a_token_travels_once_per_node():
    sent = {once: time_experts(ep=32, top_k=8, is_once=once) for once in (False, True)}
    nodes = 4 * (1 - 0.75**8)
    assert sent[True] / sent[False] == pytest.approx(nodes * 0.75 / (8 * 24 / 32), rel=0.01)


def test_selective_recomputation_repeats_what_the_program_says():
    plan = Plan(recomputation="selective", micro_batch_size=2)
    times = {}
    for name in ("NeMo", "torchtitan"):
        columns = stack_cases([describe_case(SMALL, cluster_for(plan), plan, 2, SOFTWARE[name])])
        times[name] = predict_times(columns)
        layer = time_layer(columns)
        again = layer.attention_s if name == "NeMo" else layer.memory_s + 0.25 * layer.matmul_s
        assert float(times[name]["recomputation"][0]) == pytest.approx(SMALL.layers * float(again[0]))


def test_a_shared_embedding_is_added_up_between_the_ends_of_a_pipeline():
    plan, slow = Plan(tp=2, pp=4, dp=1), Cluster.of("A100-SXM-80GB", nodes=4, gpus_per_node=2, network_gbit_per_s=1.0)
    tied = replace(SMALL, tied_embeddings=True)
    apart = replace(SMALL, tied_embeddings=False)
    step = lambda model, cluster, plan: predict(model, cluster, plan, 8).time_items_s["data_parallel"]  # noqa: E731
    num_bytes = 4 * SMALL.vocabulary * SMALL.hidden / 2  # of gradients, on each of two tensor ranks
    share = slow.network.bandwidth_bytes_per_s * get_constants("ampere").network_fraction
    assert 1.0 < step(tied, slow, plan) / (num_bytes / share) < 1.4  # two ranks send half of it twice, and fill a chain
    assert step(apart, slow, plan) == step(tied, slow, replace(plan, pp=1, dp=4, zero_stage=3)) == 0.0
    box = Cluster.of("A100-SXM-80GB", nodes=1, gpus_per_node=8)
    assert 0 < step(tied, box, plan) < 0.05 * step(tied, slow, plan)


def time_recipe(**traits):
    model = get_model_shape("Qwen3-30B-A3B")
    plan = Plan(ep=traits.pop("ep", 8), dp=8, micro_batch_size=1)
    software = replace(SOFTWARE["NeMo"], **traits)
    return predict(model, Cluster.of("GB200", nodes=2, gpus_per_node=4), plan, 8, software=software).time_items_s


def test_replayed_parts_of_a_layer_spare_the_host_and_whole_iterations_more():
    each, parts, whole = time_recipe(), time_recipe(records_layers=True), time_recipe(is_compiled=True)
    assert each["launch_wait"] > 2 * parts["launch_wait"] > whole["launch_wait"]
    assert each["matmul"] == parts["matmul"] == whole["matmul"]


def test_the_host_issues_kernels_for_each_expert_that_a_device_holds():
    model, cluster = get_model_shape("Qwen3-30B-A3B"), Cluster.of("GB200", nodes=2, gpus_per_node=4)
    columns = [stack_cases([describe_case(model, cluster, Plan(ep=ep, dp=8), 8)]) for ep in (8, 4)]
    more = time_layer(columns[1]).kernels - time_layer(columns[0]).kernels
    assert more == pytest.approx(5 * model.experts / 8)


def test_fused_experts_write_no_gate_and_no_casts():
    plain, fused = time_recipe(), time_recipe(fuses_experts=True)
    assert 0.5 * plain["memory_bound"] < fused["memory_bound"] < plain["memory_bound"]
    assert fused["matmul"] == plain["matmul"]


def test_a_processor_that_issues_its_own_kernels_waits_for_each():
    device = get_accelerator("A100-SXM-80GB")
    apart, same = (
        predict(SMALL, Cluster.of(replace(device, is_host=is_host), gpus_per_node=1), Plan(micro_batch_size=8), 8)
        for is_host in (False, True)
    )
    assert apart.time_items_s["launch_wait"] == 0.0  # the device is busy for longer than its host
    launches = 2 * SMALL.layers * 33 * device.constants.launch_s
    assert same.step_time_s - apart.step_time_s == pytest.approx(launches)


def test_places_of_experts_are_computed_whether_tokens_fill_them_or_not():
    model = get_model_shape("Mixtral-8x7B")
    plan, cluster = Plan(dp=8, ep=8, zero_stage=1), Cluster.of("H100-SXM-80GB", gpus_per_node=8)
    bare, spare = (predict(replace(model, capacity_factor=each), cluster, plan, 8) for each in (1.0, 1.5))
    experts = 3 * 2 * model.expert_parameters * model.top_k * model.sequence * model.layers  # operations of one device
    more_s = spare.time_items_s["matmul"] - bare.time_items_s["matmul"]
    assert 0.5 * experts / device_rate("H100-SXM-80GB") < more_s < 0.6 * experts / device_rate("H100-SXM-80GB")
    assert spare.memory_items_bytes["activations"] > 1.1 * bare.memory_items_bytes["activations"]
    with pytest.raises(ConfigError, match="leaves experts no room"):
        replace(model, capacity_factor=0.0)


def device_rate(name):
    device = get_accelerator(name)
    return device.get_peak_flops("bf16") * device.constants.matmul_fraction


def play_on_shared_cores(plan, num_micro_batches, num_cores, forward_s=1.0, backward_s=2.0):
    """Seconds of a pipeline whose ranks share cores, in time slices: an independent account of who works when.

    `forward_s` and `backward_s` are those of a stage while all ranks compute.
    """
    orders = [order_work("1f1b", plan.pp, stage, num_micro_batches) for stage in range(plan.pp)]
    done, left, place, clock_s, slice_s = set(), [None] * plan.pp, [0] * plan.pp, 0.0, 0.005
    num_ranks = plan.num_devices
    while any(place[stage] < len(orders[stage]) for stage in range(plan.pp)):
        working = []
        for stage in range(plan.pp):
            if place[stage] == len(orders[stage]):
                continue
            work = orders[stage][place[stage]]
            before = stage - 1 if work.kind == "forward" else stage + 1
            if not 0 <= before < plan.pp or (work.kind, work.micro_batch, before) in done:
                working.append(stage)
                if left[stage] is None:
                    left[stage] = forward_s if work.kind == "forward" else backward_s
        num_busy = len(working) * num_ranks / plan.pp
        speed = min(num_ranks / num_busy, num_ranks / num_cores)
        for stage in working:
            left[stage] -= slice_s * speed
            if left[stage] <= 1e-9:
                work = orders[stage][place[stage]]
                done.add((work.kind, work.micro_batch, stage))
                place[stage], left[stage] = place[stage] + 1, None
        clock_s += slice_s
    return clock_s


@pytest.mark.parametrize(("pp", "dp", "num_cores"), [(4, 1, 2), (2, 2, 2), (2, 1, 1), (4, 1, 1), (4, 2, 4), (8, 1, 4)])
@pytest.mark.parametrize("num_micro_batches", [8, 16])
def test_a_bubble_costs_what_it_leaves_idle_of_the_cores_that_ranks_share(pp, dp, num_cores, num_micro_batches):
    plan = Plan(pp=pp, dp=dp)
    headless = replace(SMALL, vocabulary=1)  # equal stages, as those that are played
    cluster = Cluster.of("A100-SXM-80GB", gpus_per_node=plan.num_devices)
    alone, shared = (
        predict(headless, replace(cluster, num_cores=cores), plan, num_micro_batches * dp).time_items_s
        for cores in (plan.num_devices, num_cores)
    )
    played_alone, played_shared = (
        play_on_shared_cores(plan, num_micro_batches, cores) - 3.0 * num_micro_batches
        for cores in (plan.num_devices, num_cores)
    )
    assert played_alone == pytest.approx(3.0 * (pp - 1), rel=0.02)  # the usual bubble
    share = shared["pipeline_bubble"] / alone["pipeline_bubble"]
    assert share == pytest.approx(played_shared / played_alone, abs=0.03)


def test_ranks_with_a_core_each_share_nothing():
    plan = Plan(pp=4, dp=2)
    alone = Cluster.of("A100-SXM-80GB")
    assert predict(SMALL, replace(alone, num_cores=8), plan, 16) == predict(SMALL, alone, plan, 16)


def test_a_heavy_head_is_carried_by_all_who_share_its_cores():
    plan, cluster = Plan(pp=2), Cluster.of("A100-SXM-80GB", gpus_per_node=2)
    heavy = replace(SMALL, vocabulary=1_000_000)
    own, shared = (
        predict(heavy, replace(cluster, num_cores=cores), plan, 8).time_items_s for cores in (2, 1)
    )  # the same speeds of a rank, and as much to do: with one core for both, what one waits for the other gets
    busy = ("matmul", "attention", "memory_bound", "head")
    assert sum(shared[name] for name in busy) < 0.6 * sum(own[name] for name in busy)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_what_travels_and_stays_in_32_bits_is_twice_as_much(zero_stage):
    plan = Plan(tp=2, dp=2, zero_stage=zero_stage)
    cluster = Cluster.of("A100-SXM-80GB", gpus_per_node=4)
    narrow, wide = (predict(SMALL, cluster, replace(plan, precision=name), 8) for name in ("bf16", "fp32"))
    assert wide.memory_items_bytes["activations"] == pytest.approx(2 * narrow.memory_items_bytes["activations"])
    states = ("weights", "gradients", "optimizer")
    # 4 + 4 + 8 bytes of a weight against 2 + 4 + 12, of which shards keep 4 + 12.
    share = 16 / (16 if zero_stage == 3 else 18)
    assert sum(wide.memory_items_bytes[name] for name in states) == pytest.approx(
        share * sum(narrow.memory_items_bytes[name] for name in states)
    )


def test_gloo_scatters_by_summing_all_of_a_buffer():
    device = replace(get_accelerator("L4"), is_host=True)
    columns = [
        stack_cases([describe_case(SMALL, Cluster.of(kind, gpus_per_node=4), Plan(dp=4, zero_stage=2), 8)])
        for kind in (get_accelerator("L4"), device)
    ]
    group = form_group(columns[0], np.array([4.0]), np.array([1.0]))
    ring, gloo = (float(reduce_scatter_s(c, np.array([1e8]), group)[0] - c.collective_s[0]) for c in columns)
    assert gloo == pytest.approx(2 * ring)
