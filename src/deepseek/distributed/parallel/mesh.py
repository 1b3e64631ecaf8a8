"""The ranks of a plan, by axis: who are my tensor, data, expert and pipeline neighbors?

    rank = ((pp * dp + d) * cp + c) * tp + t          Megatron-LM's order, as `plan.py` numbers them

Three views of the same ranks, since torch's sharding takes one axis of a mesh at a time:

    base      (pp, dp, cp, tp)                        what every plan has
    dense     (pp, dp_replica, dp_shard, cp, tp)      `base`, or with `dp` cut into groups that share weights (HSDP)
    experts   (pp, dp_expert, ep, cp, tp)             `dp` cut into groups that spread the experts over `ep` ranks

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
    sizes = {"pp": plan.pp, "dp": plan.dp, "cp": plan.cp, "tp": plan.tp}
    base = _build(device_type, sizes)
    dense = base
    if plan.shard_group and plan.shard_group < plan.dp:
        inner = plan.shard_group
        dense = _build(
            device_type,
            {"pp": plan.pp, "dp_replica": plan.dp // inner, "dp_shard": inner, "cp": plan.cp, "tp": plan.tp},
        )
    experts = base
    if plan.ep > 1:
        experts = _build(
            device_type, {"pp": plan.pp, "dp_expert": plan.dp // plan.ep, "ep": plan.ep, "cp": plan.cp, "tp": plan.tp}
        )
    return PlanMesh(plan, base, dense, experts)


def _build(device_type: str, sizes: dict[str, int]) -> DeviceMesh:
    ranks = torch.arange(dist.get_world_size()).view(*sizes.values())
    return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(sizes))
