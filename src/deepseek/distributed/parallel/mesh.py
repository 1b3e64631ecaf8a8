"""The ranks of a plan, by axis: who are my tensor, data, expert and pipeline neighbors?

    rank = ((pp * dp + d) * cp + c) * tp + t          Megatron-LM's order, as `plan.py` numbers them

Three views of the same ranks, since torch's sharding takes one axis of a mesh at a time:

    base      (pp, dp, cp, tp)                        what every plan has
    dense     (pp, dp_cp, tp)                         who has the same weights, apart from experts, and other tokens
              (pp, dp_replica, dp_shard, tp)          with `dp` cut into groups that share weights (HSDP)
    experts   (pp, ep, expert_copies, tp)             `dp` cut into groups that spread the experts over `ep` ranks

Making a mesh costs one process group per axis, so a program makes one and keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class PlanMesh:
    """The ranks of a plan in its three views."""

    plan: Plan
    base: DeviceMesh
    dense: DeviceMesh
    experts: DeviceMesh

    @property
    def data_axis(self) -> str:
        """The axis of the ranks that have other tokens: other rows (`dp`), or other parts of the same rows, too."""
        return "dp_cp" if self.plan.cp > 1 else "dp"

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the group of this rank's neighbors along `axis`."""
        return self._view(axis).get_group(axis)

    def coordinate(self, axis: str) -> int:
        """Return the place of this rank among its neighbors along `axis`, from 0."""
        return self._view(axis).get_local_rank(axis)

    def size(self, axis: str) -> int:
        """Return how many ranks are neighbors along `axis`."""
        view = self._view(axis)
        assert view.mesh_dim_names is not None
        return view.size(view.mesh_dim_names.index(axis))

    def _view(self, axis: str) -> DeviceMesh:
        for view in (self.base, self.dense, self.experts):
            if axis in (view.mesh_dim_names or ()):
                return view
        raise KeyError(axis)


def build_mesh(plan: Plan, device_type: str = "cpu") -> PlanMesh:
    """Build the mesh of `plan` over all ranks of the process group, which has to be there.

    Raises `ConfigError` where the plan is for another number of ranks.
    """
    world_size = dist.get_world_size()
    if plan.num_devices != world_size:
        raise ConfigError(
            f"tp*pp*dp*cp = {plan.tp}*{plan.pp}*{plan.dp}*{plan.cp} = {plan.num_devices} and there are {world_size} "
            "ranks; make the two equal"
        )
    ranks = torch.arange(world_size).view(plan.pp, plan.dp, plan.cp, plan.tp)
    base = DeviceMesh(device_type, ranks, mesh_dim_names=AXES)
    dense = experts = base
    if plan.cp > 1:
        dense = DeviceMesh(device_type, ranks.flatten(1, 2), mesh_dim_names=("pp", "dp_cp", "tp"))
    elif plan.shard_group and plan.shard_group < plan.dp:
        cut = ranks.view(plan.pp, plan.dp // plan.shard_group, plan.shard_group, plan.tp)
        dense = DeviceMesh(device_type, cut, mesh_dim_names=("pp", "dp_replica", "dp_shard", "tp"))
    if plan.ep > 1:
        spread = ranks.unflatten(1, (-1, plan.ep)).transpose(1, 2).flatten(2, 3)
        experts = DeviceMesh(device_type, spread, mesh_dim_names=("pp", "ep", "expert_copies", "tp"))
    return PlanMesh(plan, base, dense, experts)
