import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.distributed.plan import Plan
from deepseek.planning.estimate import compute
from deepseek.planning.estimate.columns import describe_case, stack_cases
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.software import MODERN, Software
from deepseek.planning.models.model_shape import get_model_shape

NODE = Cluster.of("A100-SXM-80GB")
SIZES = st.integers(1, 20000)


def table(plan=Plan(tp=8), software=MODERN):  # noqa: B008 - plans are frozen
    return stack_cases([describe_case(get_model_shape("SP-22B"), NODE, plan, 4, software)])


def multiply(m, n, k, c=None):
    return compute.multiply_s(c or table(), *(np.array([float(each)]) for each in (m, n, k)))[0]


def test_a_large_product_runs_at_the_fitted_share_of_the_peak():
    c = table()
    ideal = 2 * 27648 * 16384 * 65536 / (c.peak_flops_16 * c.matmul_fraction)[0]  # whole waves of whole tiles
    assert multiply(27648, 16384, 65536) == pytest.approx(ideal, rel=0.01)


@given(SIZES, SIZES, SIZES)
def test_no_product_beats_the_roofline(m, n, k):
    c = table()
    flops, moved = 2.0 * m * n * k, 2.0 * (m * k + k * n + m * n)
    bound = max(flops / (c.peak_flops_16 * c.matmul_fraction)[0], moved / (c.memory_bandwidth * c.memory_fraction)[0])
    assert multiply(m, n, k) >= bound * (1 - 1e-9)


def test_one_tile_more_than_a_wave_costs_another_wave():
    wave = multiply(128 * 108 * 2, 128, 8192)
    assert multiply(128 * 108 * 2 + 1, 128, 8192) > 1.05 * wave


@given(SIZES, SIZES, SIZES, st.integers(1, 64))
def test_a_larger_product_is_never_faster(m, n, k, more):
    assert multiply(m + more, n, k) >= multiply(m, n, k) * (1 - 1e-9)
    assert multiply(m, n, k + more) >= multiply(m, n, k) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("row", "plan", "forward_ms", "backward_ms"),
    [  # Korthikanti et al. 2022, Table 4: GPT 22B, one layer, 8 A100, micro-batch 4; exchanges are priced elsewhere
        ("no recomputation", Plan(tp=8, micro_batch_size=4), 7.7, 11.9),
    ],
)
def test_one_layer_takes_what_was_measured(row, plan, forward_ms, backward_ms):
    from deepseek.planning.estimate.step import _time_tensor_parallel

    c = table(plan, Software("unfused"))
    layer, exchange = compute.time_layer(c), _time_tensor_parallel(c)[0]
    assert 1e3 * (layer.forward_s[0] + exchange) == pytest.approx(forward_ms, rel=0.12), row
    assert 1e3 * (layer.backward_s[0] + exchange) == pytest.approx(backward_ms, rel=0.15), row


def test_the_operations_of_a_layer_are_those_of_the_published_formula():
    shape = get_model_shape("SP-22B")
    h, s, layers, words = shape.hidden, shape.sequence, shape.layers, shape.vocabulary
    formula = 72 * layers * s * h**2 * (1 + s / (6 * h) + words / (12 * h * layers))  # arXiv:2205.05198, eq. 7
    weights = layers * (shape.attention_parameters + shape.dense_mlp_parameters) + words * h
    assert 3 * (2 * weights * s + 4 * s * s * h * layers) == pytest.approx(formula, rel=1e-9)


def test_rank_parameters_add_up_to_the_model():
    shape = get_model_shape("Mixtral-8x7B")
    plan = Plan(tp=2, dp=4, ep=8)
    shared, experts = compute.count_rank_parameters(stack_cases([describe_case(shape, NODE, plan, 8)]))
    norms = 2 * shape.hidden * shape.layers
    assert 2 * (shared[0] - norms) + norms + 8 * experts[0] == pytest.approx(shape.num_parameters, rel=1e-4)


def test_heads_that_do_not_fill_vector_loads_are_slow():
    software = Software("unfused")
    good, bad = (
        stack_cases([describe_case(shape, NODE, Plan(tp=8, micro_batch_size=4), 4, software)])
        for shape in (get_model_shape("SP-22B"), get_model_shape("SP-22B").__class__(
            layers=48, hidden=6144, heads=64, ffn=24576, vocabulary=51200, sequence=2048, head_dim=100, gated=False))
    )  # fmt: skip
    assert compute.time_layer(bad).attention_s[0] > 1.5 * compute.time_layer(good).attention_s[0]
