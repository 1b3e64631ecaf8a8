import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.legality import (
    ModelParts,
    check_plan_runs,
    explain_illegal,
    find_nearest_legal,
    list_nearest,
)
from deepseek.distributed.plan import Plan

HEADS = (("num_heads", 4), ("num_kv_heads", 2))
DECODER = ModelParts("Decoder", 6, HEADS, 8, has_tensor_rows=True, has_sequence_rows=True, has_context_rows=True)
OWN = ModelParts("Mine")
ILLEGAL = [
    (Plan(tp=2), OWN, "tp=2 needs to know which layers of Mine to cut"),
    (Plan(pp=2), OWN, "pp=2 needs to know the layers of Mine"),
    (Plan(dp=2, ep=2), OWN, "ep=2 needs a model with experts"),
    (Plan(tp=2, sequence_parallel=True), ModelParts("ViT", 2, HEADS, has_tensor_rows=True), "no rows say where ViT"),
    (Plan(tp=4), DECODER, "tp=4 does not divide num_kv_heads=2; choose one of 1, 2"),
    (Plan(pp=8), DECODER, r"pp\*virtual_stages = 8 is more than layers=6"),
    (Plan(pp=4, schedule="interleaved", virtual_stages=2), DECODER, r"pp\*virtual_stages = 8"),
    (Plan(dp=3, ep=3), DECODER, "ep=3 does not divide experts=8; choose one of 1, 2, 4, 8"),
    (Plan(dp=2, ep=4), DECODER, "does not divide dp=2"),
    (Plan(pp=2, zero_stage=3), DECODER, "zero_stage=3 gathers weights for every micro-batch and excludes pp=2"),
    (Plan(cp=2), OWN, "cp=2 cuts sequences, and no rows say how tokens of Mine see each other; use cp=1"),
    (Plan(cp=2, dp=4, zero_stage=3, shard_group=2), DECODER, "with cp=2 weights are shared over dp\\*cp"),
    (Plan(tp=2, dp=2, etp=2, ep=2), DECODER, "etp=2 cuts inside experts"),
    (Plan(pp=2, dp=2, zero_stage=1, schedule="zero_bubble"), DECODER, "after ZeRO has reduced them and excludes"),
    (Plan(dp=2, sequence_parallel=True), DECODER, "tp=1; leave it out"),
    (Plan(dp=4, shard_group=2), DECODER, "shard_group=2 says who shares weights and zero_stage=0 shares none"),
]


@pytest.mark.parametrize(("plan", "parts", "reason"), ILLEGAL)
def test_an_illegal_plan_is_refused_with_the_rule_and_the_nearest_legal_one(plan, parts, reason):
    with pytest.raises(ConfigError, match=reason) as refusal:
        check_plan_runs(plan, parts)
    nearest = find_nearest_legal(plan, parts)
    assert nearest is not None and nearest.num_devices == plan.num_devices
    assert explain_illegal(nearest, parts) is None
    assert f"the nearest plan that runs on {plan.num_devices} ranks is " in str(refusal.value)


def test_the_nearest_plans_for_another_number_of_ranks_can_run_there():
    nearest = list_nearest(Plan(tp=2, dp=2, zero_stage=1), DECODER, 2)
    assert nearest[0] in (Plan(dp=2, zero_stage=1), Plan(tp=2))
    assert len(nearest) == 3
    assert all(plan.num_devices == 2 and explain_illegal(plan, DECODER) is None for plan in nearest)
    assert list_nearest(Plan(dp=2), DECODER, 1) == [Plan()]


def test_the_nearest_plan_keeps_what_it_can():
    nearest = find_nearest_legal(Plan(pp=2, dp=2, zero_stage=3, micro_batch_size=4), DECODER)
    assert nearest == Plan(pp=2, dp=2, zero_stage=1, micro_batch_size=4)
    assert find_nearest_legal(Plan(tp=4, dp=2), DECODER) == Plan(tp=2, dp=4)
    assert find_nearest_legal(Plan(tp=4, cp=2), DECODER) == Plan(tp=2, cp=2, dp=2)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(tp=2, pp=3, dp=2), Plan(dp=8, ep=4, zero_stage=3, shard_group=2), Plan(tp=2, pp=2, ep=1)]
)
def test_a_legal_plan_runs(plan):
    check_plan_runs(plan, DECODER)
