import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan
from deepseek.planning.feasibility import explain_misfit, validate
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import OperatorCost, OperatorList, get_model_shape

LLAMA, MIXTRAL = get_model_shape("Llama3-8B"), get_model_shape("Mixtral-8x7B")
NODE = Cluster.of("H100-SXM-80GB")


@pytest.mark.parametrize(
    ("plan", "model", "batch", "words"),
    [
        (Plan(tp=2), LLAMA, 8, "tp*pp*dp*cp = 2*1*1*1 = 2 does not fill the cluster's 8 devices"),
        (Plan(dp=8), LLAMA, 12, "global_batch=12 is not a multiple of dp*micro_batch_size = 8*1 = 8"),
        (Plan(dp=8), LLAMA, 0, "global_batch=0 is not a positive number"),
        (Plan(pp=8, schedule="interleaved", virtual_stages=2), LLAMA, 12, "to be a multiple of pp=8"),
        (Plan(pp=8, schedule="interleaved", virtual_stages=8), LLAMA, 16, "is more than layers=32"),
        (Plan(pp=2, dp=4, zero_stage=3), LLAMA, 8, "excludes pp=2"),
        (Plan(dp=8, ep=8), LLAMA, 8, "ep=8 needs a model with experts"),
        (Plan(dp=8, ep=3), MIXTRAL, 8, "ep=3 does not divide experts=8; choose one of 1, 2, 4, 8"),
        (Plan(dp=4, tp=2, ep=8, etp=2), MIXTRAL, 8, "does not divide tp*cp*dp = 8"),
        (
            Plan(tp=8),
            OperatorList("net", (OperatorCost("a", 1.0, 1.0),)),
            8,
            "does not apply to a traced operator list",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(plan, model, batch, words):
    with pytest.raises(ConfigError) as caught:
        validate(plan, model, NODE, batch)
    assert words in str(caught.value)
    assert ". " not in str(caught.value)


@pytest.mark.parametrize("tp", [3, 5, 7])
def test_prime_sizes_name_the_divisors_that_would_fit(tp):
    reason = explain_misfit(Plan(tp=tp), LLAMA, Cluster.of("H100-SXM-80GB", gpus_per_node=tp), 1)
    assert reason == f"tp={tp} does not divide heads=32; choose one of 1, 2, 4, 8, 16, 32"


def test_stages_of_unequal_depth_are_refused_unless_they_are_asked_for():
    cluster = Cluster.of("H100-SXM-80GB", gpus_per_node=3)
    plan = Plan(pp=3, micro_batch_size=1)
    assert "does not divide layers=32" in explain_misfit(plan, LLAMA, cluster, 8)
    assert explain_misfit(plan, LLAMA, cluster, 8, is_padding_layers=True) is None
