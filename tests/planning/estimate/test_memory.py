from dataclasses import replace

import numpy as np
import pytest

from deepseek.distributed.plan import Plan
from deepseek.planning.estimate.columns import describe_case, stack_cases
from deepseek.planning.estimate.memory import MEMORY_ITEMS, measure_layer, measure_memory
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.software import MODERN, SOFTWARE, Software
from deepseek.planning.models.model_shape import ModelShape, get_model_shape

UNFUSED = Software("unfused")
SHAPE = get_model_shape("SP-22B")
S, B, H, A, T = 2048, 4, 6144, 64, 8


def layer_bytes(**plan):
    return measure_layer(table(Plan(micro_batch_size=B, **plan), software=UNFUSED))[0]


def table(plan, shape=SHAPE, batch=4, software=MODERN):
    cluster = Cluster.of("A100-SXM-80GB", nodes=max(plan.num_devices // 8, 1), gpus_per_node=min(plan.num_devices, 8))
    return stack_cases([describe_case(shape, cluster, plan, batch, software)])


@pytest.mark.parametrize(
    ("plan", "published"),
    [  # Korthikanti et al. 2022, Table 2
        ({}, S * B * H * (34 + 5 * A * S / H)),
        ({"tp": T}, S * B * H * (10 + 24 / T + 5 * A * S / (H * T))),
        ({"tp": T, "sequence_parallel": True}, S * B * H / T * (34 + 5 * A * S / H)),
        ({"tp": T, "recomputation": "selective"}, S * B * H * (10 + 24 / T)),
        ({"tp": T, "sequence_parallel": True, "recomputation": "selective"}, S * B * H / T * 34),
    ],
)
def test_a_layer_keeps_what_megatrons_formula_says(plan, published):
    assert layer_bytes(**plan) == pytest.approx(published)


@pytest.mark.parametrize(
    ("name", "micro_batch", "pp", "virtual", "gib"),
    [
        ("SP-22B", 4, 1, 1, 59.25),
        ("SP-175B", 1, 8, 3, 66.84),
        ("SP-530B", 1, 35, 3, 114.02),
        ("SP-1T", 1, 64, 1, 131.25),
    ],
)
def test_activations_without_recomputation_are_the_published_ones(name, micro_batch, pp, virtual, gib):
    schedule = "interleaved" if virtual > 1 else "1f1b"
    plan = Plan(tp=8, pp=pp, micro_batch_size=micro_batch, schedule=schedule, virtual_stages=virtual)
    activations = measure_memory(table(plan, get_model_shape(name), 4 * pp, UNFUSED))["activations"][0]
    assert activations / 2**30 == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize(
    ("program", "stage", "bytes_per_parameter"),
    [
        ("modern", 0, 18.0),
        ("modern", 1, 6 + 12 / 8),
        ("modern", 2, 2 + 16 / 8),
        ("modern", 3, 16 / 8),  # FSDP keeps no 16 bit shards
        ("nanotron", 3, 18 / 8),
    ],
)
def test_model_state_is_sharded_by_zero_stage(program, stage, bytes_per_parameter):
    items = measure_memory(table(Plan(dp=8, zero_stage=stage), batch=8, software=SOFTWARE[program]))
    state = items["weights"] + items["gradients"] + items["optimizer"]
    assert state[0] == pytest.approx(bytes_per_parameter * SHAPE.num_parameters, rel=2e-3)


def test_the_first_stage_of_1f1b_holds_one_micro_batch_per_stage():
    deep = measure_memory(table(Plan(pp=8), batch=64, software=UNFUSED))["activations"][0]
    flat = measure_memory(table(Plan(), batch=64, software=UNFUSED))["activations"][0]
    assert deep == pytest.approx(flat)


def test_gpipe_holds_all_micro_batches():
    one = measure_memory(table(Plan(pp=8), batch=8, software=UNFUSED))["activations"][0]
    four = measure_memory(table(Plan(pp=8, schedule="gpipe"), batch=32, software=UNFUSED))["activations"][0]
    assert four == pytest.approx(4 * one)


def test_full_recomputation_keeps_one_input_a_layer_and_one_layer_at_work():
    items = measure_memory(table(Plan(tp=8, micro_batch_size=B, recomputation="full"), software=UNFUSED))
    inputs = SHAPE.layers * 2 * S * B * H
    assert items["activations"][0] == pytest.approx(inputs + layer_bytes(tp=8))


def test_experts_are_divided_by_expert_parallelism():
    shape = get_model_shape("Mixtral-8x7B")
    one, eight = (measure_memory(table(Plan(dp=8, ep=ep), shape, 8))["weights"][0] for ep in (1, 8))
    assert one - eight == pytest.approx(2 * 7 / 8 * shape.moe_layers * 8 * shape.expert_parameters)


def test_frozen_weights_need_no_gradients_and_no_optimizer():
    items = measure_memory(table(Plan(dp=8), replace(SHAPE, frozen_weights=True), batch=8))
    assert items["gradients"][0] == items["optimizer"][0] == 0


def test_every_item_is_named_and_none_is_negative():
    items = measure_memory(table(Plan(tp=2, pp=2, dp=2), ModelShape(4, 256, 4, 1024, 1000, 128), 4))
    assert tuple(items) == MEMORY_ITEMS
    assert all(np.all(value >= 0) for value in items.values())
