from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.planning.feasibility import explain_misfit
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Request, Space
from deepseek.planning.search.space import build_plan, expand, list_families, list_shardings
from tests.planning.search.brute_force import EXPERTS, SMALL

LLAMA = get_model_shape("Llama3-8B")


def test_a_space_narrows_the_choice():
    space = Space(tp=(2,), zero_stages=(1,), recomputations=("full",), micro_batch_sizes=(2,), schedules=("gpipe",))
    found = plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32, space=space)
    for each in (found.best, *(other.candidate for other in found.runners_up)):
        assert (each.plan.tp, each.plan.recomputation, each.plan.micro_batch_size) == (2, "full", 2)
        assert each.plan.schedule == "gpipe" or each.plan.pp == 1


def test_a_prime_number_of_devices_has_a_plan_if_the_batch_allows_it():
    cluster = Cluster.of("H100-SXM-80GB", gpus_per_node=7)
    assert plan(SMALL, cluster, global_batch=14).best.plan.dp == 7
    awkward = replace(SMALL, layers=5, sequence=512)
    with pytest.raises(ConfigError, match="choose a batch or a number of devices with common divisors"):
        plan(awkward, cluster, global_batch=8)


@settings(max_examples=30, deadline=None)
@given(
    devices=st.sampled_from([2, 4, 6, 8, 12]),
    batch=st.sampled_from([4, 8, 12, 24]),
    model=st.sampled_from([SMALL, EXPERTS]),
    precision=st.sampled_from(["bf16", "fp16"]),
)
def test_every_row_of_every_family_is_a_plan_that_fits_and_none_comes_twice(devices, batch, model, precision):
    request = Request(
        model, Cluster.of("H100-SXM-80GB", gpus_per_node=devices), batch, space=Space(precision=precision)
    )
    families, _, _ = list_families(request)
    tables = list(expand(families, np.ones(len(list_shardings(families)), np.bool_), chunk_rows=100))
    plans = [build_plan(row, request.space) for table in tables for row in table]
    assert len(plans) == len(set(plans)) == sum(family.num_candidates for family in families)
    for candidate in plans:
        is_uneven = candidate.virtual_stages == 1
        reason = explain_misfit(candidate, model, request.cluster, batch, is_padding_layers=is_uneven)
        assert reason is None
        assert candidate.precision == precision
