import statistics
from dataclasses import replace

import numpy as np
import pytest

from deepseek.distributed.plan import Plan
from deepseek.planning.estimate.columns import describe_case, stack_cases
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.software import Software
from deepseek.planning.models.model_shape import ModelShape
from tests.distributed.ranks import run_ranks
from tests.planning.plain_decoder import measure_step
from tests.planning.rank_work import measure_pipeline, measure_shapes, measure_tensor_parallel

# What `plain_decoder` does: torch's operators one by one. At the peak, early in the backward pass, a logit has
# the logarithm of its probability and the gradients of that and of itself, 4 bytes each.
PLAIN = Software(
    fuses_accumulation=False, fuses_elementwise=False, regathers_inputs=False, logit_bytes=12.0, narrows_shards=True
)
STATE = ("weights", "gradients", "optimizer")
HELD = (*STATE, "activations", "logits")  # a driver's context, its communicators and gaps are not torch's tensors
HELD_WITH_MESSAGES = (*HELD, "communication_buffers")
SMALL = ModelShape(layers=4, hidden=128, heads=4, ffn=384, vocabulary=512, sequence=128)
CASES = {
    "plain": (SMALL, 2, False),
    "grouped": (replace(SMALL, kv_heads=2), 2, False),
    "grouped, recomputing": (replace(SMALL, kv_heads=2), 2, True),
    "wide vocabulary": (
        replace(SMALL, layers=2, hidden=256, heads=8, head_dim=32, vocabulary=2048, sequence=64),
        4,
        False,
    ),
    "deep": (replace(SMALL, layers=8, kv_heads=1, ffn=512, vocabulary=256), 4, False),
    "deep, recomputing": (replace(SMALL, layers=8, kv_heads=1, ffn=512, vocabulary=256, sequence=256), 4, True),
}


def predict_items(shape, plan, batch):
    cluster = Cluster.of("A100-SXM-80GB", gpus_per_node=plan.num_devices)
    columns = stack_cases([describe_case(shape, cluster, plan, batch, PLAIN)]).with_columns(
        communicator_bytes=np.zeros(1)
    )
    return {name: float(value[0]) for name, value in measure_memory(columns).items()}


@pytest.fixture(scope="module")
def ratios():
    found = {}
    for name, (shape, micro_batch, is_recomputing) in CASES.items():
        peak, state = measure_step(shape, micro_batch, is_recomputing=is_recomputing)
        plan = Plan(micro_batch_size=micro_batch, recomputation="full" if is_recomputing else "none")
        items = predict_items(shape, plan, 2 * micro_batch)
        found[name] = (sum(items[each] for each in HELD) / peak, sum(items[each] for each in STATE) / state)
    return found


def test_memory_is_what_torch_holds_within_five_percent_in_the_median(ratios):
    assert statistics.median(abs(whole - 1) for whole, _ in ratios.values()) <= 0.05


@pytest.mark.parametrize("name", CASES)
def test_memory_is_never_more_than_three_percent_too_low(ratios, name):
    assert 0.97 <= ratios[name][0] <= 1.12


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_optimizer_are_exact(ratios, name):
    assert ratios[name][1] == pytest.approx(1.0, abs=2e-3)


def test_more_micro_batches_hold_no_more_at_once():
    one, three = (measure_step(SMALL, 2, micro_batches=count)[0] for count in (1, 3))
    assert three == pytest.approx(one, rel=0.02)
    once, often = (predict_items(SMALL, Plan(micro_batch_size=2), batch) for batch in (2, 6))
    assert once["activations"] == often["activations"]


def test_sharded_training_holds_what_is_predicted():
    shapes = [replace(SMALL, layers=8, kv_heads=2), replace(SMALL, layers=8, hidden=64, head_dim=16, ffn=192)]
    measured = run_ranks(measure_shapes, 2, shapes, 2, 2)
    for place, shape in enumerate(shapes):
        items = predict_items(shape, Plan(dp=2, zero_stage=3, micro_batch_size=2), 4)
        for peak, state in (ranks[place] for ranks in measured):
            assert sum(items[each] for each in STATE) == pytest.approx(state, rel=0.01)
            assert 0.97 <= sum(items[each] for each in HELD) / peak <= 1.1


def test_tensors_cut_over_ranks_hold_what_is_predicted():
    shapes = [SMALL, replace(SMALL, layers=8, kv_heads=2)]
    measured = run_ranks(measure_tensor_parallel, 2, shapes, 2, 2)
    for place, shape in enumerate(shapes):
        items = predict_items(shape, Plan(tp=2, micro_batch_size=2), 4)
        for peak, state in (ranks[place] for ranks in measured):
            assert sum(items[each] for each in STATE) == pytest.approx(state, rel=0.01)
            assert 0.97 <= sum(items[each] for each in HELD_WITH_MESSAGES) / peak <= 1.1


def test_stages_of_a_pipeline_hold_no_more_than_is_predicted():
    shapes = [replace(SMALL, layers=8), replace(SMALL, layers=8, hidden=64, head_dim=16, ffn=192)]
    measured = run_ranks(measure_pipeline, 2, shapes, 2, 2, 4)
    for place, shape in enumerate(shapes):
        items = predict_items(shape, Plan(pp=2, micro_batch_size=2), 8)
        peak = max(ranks[place][0] for ranks in measured)
        state = max(ranks[place][1] for ranks in measured)
        assert sum(items[each] for each in STATE) == pytest.approx(state, rel=0.01)
        assert 0.97 <= sum(items[each] for each in HELD_WITH_MESSAGES) / peak <= 1.12
