import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape

LLAMA, MIXTRAL = get_model_shape("Llama3-8B"), get_model_shape("Mixtral-8x7B")
NODE = Cluster.of("H100-SXM-80GB")


@given(st.sampled_from(["tp", "pp", "dp", "ep", "cp", "etp", "micro_batch_size", "virtual_stages"]), st.integers(-4, 0))
def test_a_count_below_one_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value} is not a positive whole number"):
        Plan(**{name: value})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("schedule", "1f1", "did you mean '1f1b'"),
        ("recomputation", "fully", "did you mean 'full'"),
        ("precision", "bf61", "did you mean 'bf16'"),
        ("zero_stage", 4, "choose one of 0, 1, 2, 3"),
        ("shard_group", 3, "does not divide dp=1"),
        ("virtual_stages", 2, "needs schedule='interleaved'"),
    ],
)
def test_an_unknown_choice_is_refused(field, value, words):
    with pytest.raises(ConfigError, match=words):
        Plan(**{field: value})


def test_a_plan_comes_back_from_its_own_dict():
    plan = Plan(tp=2, pp=4, dp=2, zero_stage=1, recomputation="full", schedule="interleaved", virtual_stages=2)
    assert Plan(**plan.as_dict()) == plan
    assert (plan.num_devices, plan.count_micro_batches(64)) == (16, 32)


def test_experts_are_copied_over_the_ranks_that_do_not_share_them():
    assert Plan(tp=4, dp=16, ep=8, etp=1).expert_dp == 8
