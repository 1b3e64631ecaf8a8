import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan
from deepseek.planning.search.throughput import Throughput, count_model_flops, estimate_budget, measure_throughput

LLAMA = get_model_shape("Llama3-8B")


def test_utilization_is_model_operations_over_what_the_devices_could_do():
    cluster = Cluster.of("H100-SXM-80GB")
    found = measure_throughput(LLAMA, cluster, 16, "bf16", 2.0)
    assert found.tokens_per_s == 16 * 8192 / 2.0
    assert found.mfu == pytest.approx(count_model_flops(LLAMA, 16) / (2.0 * 8 * 989e12))
    best = plan(LLAMA, cluster, global_batch=16)
    assert best.throughput == measure_throughput(LLAMA, cluster, 16, "bf16", best.best.step_time_s)


@given(st.integers(1, 10**15), st.integers(1, 10**7), st.floats(1.0, 1e9))
def test_a_budget_is_trained_in_whole_steps(num_tokens, tokens_per_step, tokens_per_s):
    budget = estimate_budget(Throughput(4, tokens_per_step, tokens_per_s, 0.4), num_tokens)
    trained = budget.num_steps * tokens_per_step
    assert num_tokens <= trained < num_tokens + tokens_per_step
    assert budget.days * 86400 == pytest.approx(trained / tokens_per_s)
    assert budget.device_hours == pytest.approx(4 * 24 * budget.days)
    assert budget.cost is None


@pytest.mark.parametrize(("tokens", "price"), [(0, None), (-5, None), (10, 0.0), (10, -1.0), (10, float("nan"))])
def test_a_budget_of_nothing_is_refused(tokens, price):
    with pytest.raises(ConfigError):
        estimate_budget(Throughput(4, 100, 10.0, 0.4), tokens, price)
