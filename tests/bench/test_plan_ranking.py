import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from deepseek.bench.plan_ranking import (
    PlanRanking,
    RankedPlan,
    choose_plans,
    correlate_ranks,
    rank_plans,
    train_in_turns,
)
from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.legality import ModelParts, explain_illegal
from deepseek.distributed.plan import Plan
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape
from deepseek.recipes import load_recipe
from tests.distributed.ranks import run_ranks

SHAPE = ModelShape(layers=4, hidden=64, heads=4, ffn=128, vocabulary=300, sequence=16)
PARTS = ModelParts("Decoder", 4, (("num_heads", 4), ("num_kv_heads", 4)), has_tensor_rows=True, has_sequence_rows=True)
CONFIG = load_recipe("decoder_tiny").override(
    {
        **{f"model.{name}": 16 for name in ("hidden_size", "ffn_size")},
        **{f"model.{name}": 2 for name in ("num_layers", "num_heads", "num_kv_heads")},
        "model.vocab_size": 300,
        "data.vocab_size": 300,
        "data.sequence_length": 16,
    }
)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 5)), min_size=3, max_size=12))
def test_ranks_are_correlated_as_scipy_does(pairs):
    one, other = zip(*pairs, strict=True)
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert correlate_ranks(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-5)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_plans_that_are_tried_differ_in_every_axis(num_ranks):
    plans = choose_plans(PARTS, SHAPE, Cluster.of("L4", gpus_per_node=num_ranks), 16, 12)
    assert len(plans) == len(set(plans)) == 12
    assert all(plan.num_devices == num_ranks and explain_illegal(plan, PARTS) is None for plan in plans)
    for name in ("dp", "tp", "pp", "zero_stage", "micro_batch_size"):
        assert len({getattr(plan, name) for plan in plans}) > 1, name


def test_fewer_plans_are_those_that_come_first():
    cluster = Cluster.of("L4", gpus_per_node=4)
    plans = choose_plans(PARTS, SHAPE, cluster, 16, 12)
    assert choose_plans(PARTS, SHAPE, cluster, 16, 5) == plans[:5]


def train_two(rank):
    plans = [Plan(dp=2, micro_batch_size=2, precision="fp32"), Plan(pp=2, precision="fp32")]
    return train_in_turns(CONFIG, 16, plans, 4, 3)


def test_plans_are_trained_in_turns_and_all_ranks_agree_on_the_slowest():
    first, second = run_ranks(train_two, 2)
    assert first == second
    assert all(seconds > 0 and num_bytes >= 0 for seconds, num_bytes in first)


def test_too_few_steps_are_refused_before_anything_is_measured():
    with pytest.raises(ConfigError, match="give at least 3"):
        rank_plans(CONFIG, SHAPE, num_ranks=2, num_plans=3, num_steps=2, global_batch=4)


def test_a_ranking_says_how_well_both_orders_were_predicted():
    rows = [
        RankedPlan({}, str(n), predicted, n, -predicted, n) for n, predicted in ((1.0, 5.0), (2.0, 6.0), (3.0, 9.0))
    ]
    values = PlanRanking(4, 2, tuple(rows)).to_dict()
    assert (values["time_correlation"], values["memory_correlation"]) == (1.0, -1.0)
    assert rows[0].time_ratio == 5.0


@pytest.mark.slow
def test_plans_of_two_ranks_are_measured_from_machine_to_order():
    shape = ModelShape(layers=2, hidden=16, heads=2, ffn=16, vocabulary=300, sequence=16, tied_embeddings=True)
    ranking = rank_plans(CONFIG, shape, num_ranks=2, num_plans=4, num_steps=3, global_batch=4)
    assert len(ranking.rows) == 4 and -1 <= ranking.time_correlation <= 1
