import itertools

import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.plan import Plan
from tests.distributed.ranks import run_ranks

AXES = ("pp", "dp", "cp", "tp")
PLANS = (Plan(tp=2, pp=2), Plan(dp=2, tp=2), Plan(dp=4, zero_stage=3, shard_group=2), Plan(dp=4, ep=2))


def read_coordinates(rank):
    found = []
    for plan in PLANS:
        mesh = build_mesh(plan)
        axes = [*AXES, *(["dp_replica", "dp_shard"] if plan.shard_group else []), *(["ep"] if plan.ep > 1 else [])]
        found.append({axis: (mesh.coordinate(axis), mesh.size(axis), mesh.group(axis).size()) for axis in axes})
    with pytest.raises(ConfigError, match="= 8 and there are 4 ranks; make the two equal"):
        build_mesh(Plan(dp=8))
    return found


def test_ranks_are_numbered_as_in_megatron_with_tensor_neighbors_closest():
    found = run_ranks(read_coordinates, 4)
    for index, plan in enumerate(PLANS):
        order = itertools.product(range(plan.pp), range(plan.dp), range(plan.cp), range(plan.tp))
        assert [tuple(rank[index][axis][0] for axis in AXES) for rank in found] == list(order)
        assert all(rank[index][axis][1:] == (getattr(plan, axis),) * 2 for rank in found for axis in AXES)


def test_a_shard_group_and_the_experts_cut_the_data_ranks_into_neighbors():
    found = run_ranks(read_coordinates, 4)
    assert [(rank[2]["dp_replica"][0], rank[2]["dp_shard"][0]) for rank in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [rank[3]["ep"][0] for rank in found] == [0, 1, 0, 1]
