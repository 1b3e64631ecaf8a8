import json

import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate.communication import time_steps
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.constants import get_constants
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.scaling import (
    BERT_LARGE,
    CURVES,
    GPT_1750B,
    build_curve,
    count_model_flops,
    estimate_all_reduces,
    scale_model,
)


@pytest.fixture(scope="module")
def curves():
    return {name: build_curve(name) for name in CURVES}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_prints_its_claim_its_finding_and_its_assumptions(curves, name):
    curve = curves[name]
    assert curve.rows
    assert all(len(row) == len(curve.header) for row in curve.rows)
    assert "predicted" in curve.finding
    assert len(curve.assumptions) >= 5
    assert json.loads(json.dumps(curve.to_dict()))["name"] == name


def test_weak_scaling_ends_at_1024_devices_between_80_and_100_percent(curves):
    for name in ("weak-scaling", "weak-scaling-1750b"):
        last = curves[name].rows[-1]
        assert last[1] == 1024
        assert 0.8 < last[-1] <= 1.0
    assert curves["weak-scaling-1750b"].rows[-1][2] == pytest.approx(1750, rel=0.02)


def test_data_parallelism_alone_is_never_better_and_worse_for_large_models(curves):
    points = [row[-1] for row in curves["data-parallel-only"].rows]
    assert min(points) >= 0
    assert max(points) > 5
    assert points[0] < 1


def test_two_levels_are_faster_most_for_small_messages(curves):
    ratios = [row[-1] for row in curves["hierarchical-all-reduce"].rows]
    assert ratios == sorted(ratios, reverse=True)
    assert min(ratios) > 1


def test_the_priced_ring_takes_as_long_as_its_messages_played():
    cluster = Cluster.of("A100-SXM-80GB")
    shares = get_constants("ampere")
    link = LinkClass(cluster.scale_up.alpha_s, cluster.scale_up.bandwidth_bytes_per_s * shares.scale_up_fraction)
    elements = 1 << 25
    flat, _ = estimate_all_reduces(cluster, 4 * elements)
    steps = COLLECTIVES["ring_all_reduce"](8, elements, 1)
    assert flat - shares.collective_s == pytest.approx(time_steps(steps, 4, 8, link, cluster.network), rel=0.02)


def test_sizes_are_those_that_the_names_say():
    assert BERT_LARGE.num_parameters == pytest.approx(335e6, rel=0.02)
    assert GPT_1750B.num_parameters == pytest.approx(1.75e12, rel=0.02)


def test_model_operations_are_those_of_the_published_formula():
    shape = get_model_shape("GPT3-175B")  # Narayanan et al. 2021, equation 3, without recomputation
    layers, hidden, sequence, vocabulary = shape.layers, shape.hidden, shape.sequence, shape.vocabulary
    published = (
        72 * 4 * sequence * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocabulary / (12 * layers * hidden))
    )
    assert count_model_flops(shape, 4) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(("name", "nodes"), [("strong-scaling", (1,)), ("weak-scaling", ()), ("weak-scaling", (0,))])
def test_curves_that_do_not_exist_are_refused(name, nodes):
    with pytest.raises(ConfigError):
        build_curve(name, nodes=nodes)


def test_a_model_that_fits_on_no_size_is_said():
    with pytest.raises(ConfigError, match="fits on none of"):
        build_curve("weak-scaling", accelerator="T4", nodes=(1,))


def test_a_model_of_ones_own_scales_by_the_published_formula_for_its_operations():
    model = get_model_shape("Llama3-8B")
    for batch in (None, 64):
        curve = scale_model(model, accelerator="H100-SXM-80GB", nodes=(4, 1, 2), global_batch=batch)
        assert [row[:2] for row in curve.rows] == [(1, 8), (2, 16), (4, 32)]
        for _, devices, _, _, step_s, teraflops, efficiency in curve.rows:
            flops = count_model_flops(model, batch or 2 * devices)
            assert teraflops == pytest.approx(flops / step_s / devices / 1e12, rel=1e-3)
            assert efficiency == pytest.approx(teraflops / max(row[-2] for row in curve.rows), abs=2e-3)


def test_a_cluster_that_barely_holds_a_model_does_not_make_larger_ones_efficient():
    curve = scale_model(get_model_shape("Llama2-70B"), accelerator="A100-SXM-80GB", nodes=(2, 4, 8))
    assert "full" in curve.rows[0][3]  # recomputation, for which there is no room not to
    assert [row[-1] for row in curve.rows] == pytest.approx([0.52, 1.0, 0.99], abs=0.05)
    assert "relative to the best rate, at 4" in curve.finding


def test_sizes_on_which_a_model_does_not_fit_are_named():
    curve = scale_model(get_model_shape("Llama3-70B"), accelerator="H100-SXM-80GB", nodes=(1, 4))
    assert [row[0] for row in curve.rows] == [4]
    assert curve.assumptions[-1] == "no plan fits, or none divides, on 1 nodes"


@pytest.mark.parametrize("name", ["weak-scaling", "data-parallel-only"])
def test_curves_of_older_devices_use_what_these_have(name):
    assumed = " ".join(build_curve(name, accelerator="V100-SXM-32GB", nodes=(8, 16)).assumptions)
    assert "precision: fp16" in assumed and "attention: flash;" in assumed
