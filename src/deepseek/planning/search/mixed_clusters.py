"""The search on a cluster of unequal devices: which plan, and how much of it each stage or replica gets.

Every candidate is estimated once per kind of accelerator, as if all devices were of that kind. What a kind would take
bounds a mixture from below (all layers or micro-batches assigned in ideal fractions), so candidates are taken in the
order of that bound and assigned exactly (`balancing`) until no bound is below the eleventh best found: the answer is
exact.

With a pipeline, stages are blocks of neighbouring devices and get layers by speed and memory; a stage that holds
several kinds goes at the pace of its slowest. Without one, replicas get micro-batches by speed, unless they meet in
every micro-batch (ZeRO 2 and 3, experts): then all take the same number at the pace of the slowest. Estimated so: a
stage's whole step, its wait for the pipeline included, grows with its layers, which is exact where stages end up
equally busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deepseek.core.errors import ConfigError, InfeasibleError
from deepseek.planning.estimate.columns import Array, Columns
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.estimate.step import predict_times
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.search.balancing import (
    DeviceShares,
    Share,
    assign_batches,
    assign_layers,
    cut_blocks,
    list_kinds,
)
from deepseek.planning.search.estimates import (
    BUSY_ITEMS,
    WAITING_POWER,
    Estimates,
    apply_limits,
    detail_candidates,
    find_front,
    list_assumptions,
    rank,
    sum_items,
)
from deepseek.planning.search.request import Limits, Request
from deepseek.planning.search.results import NUM_RUNNERS_UP, PlanningResult, compare
from deepseek.planning.search.space import KNOBS, Table, build_columns, expand, list_families, list_shardings

_PP, _TP, _CP, _DP, _EP, _ZERO, _SIZE, _CHUNKS = (
    KNOBS.index(name) for name in ("pp", "tp", "cp", "dp", "ep", "zero_stage", "micro_batch_size", "virtual_stages")
)
_FIXED_ITEMS = ("data_parallel", "optimizer")  # once per step, however many micro-batches a replica gets


@dataclass(frozen=True)
class _Kind:
    """All candidates on one kind of accelerator: seconds, of which fixed and busy, and bytes by stage depth."""

    accelerator: Accelerator
    seconds: Array
    fixed_s: Array
    busy_s: Array
    num_bytes: Array
    layer_bytes: Array


@dataclass(frozen=True)
class _OneOnKind:
    """One candidate on one kind of accelerator."""

    accelerator: Accelerator
    seconds: float
    fixed_s: float
    busy_s: float
    num_bytes: float
    layer_bytes: float

    def count_layers(self, limits: Limits) -> int:
        """Return how many layers one stage has room for."""
        free = self.accelerator.memory_bytes * (1.0 - limits.memory_headroom) - self.num_bytes
        return int(free // self.layer_bytes) + 1 if free >= 0 else 0

    def measure(self, layers: int) -> float:
        """Return the bytes of a stage of `layers` layers."""
        return self.num_bytes + (layers - 1) * self.layer_bytes


@dataclass(frozen=True)
class _Assigned:
    """One candidate laid over the devices."""

    row: int
    seconds: float
    num_bytes: float
    joules: float
    placement: DeviceShares


def plan_mixed(request: Request[ModelShape]) -> PlanningResult:
    """Find the same result as `planner.plan`, for a cluster of several kinds of devices, with a `placement`."""
    cluster, space = request.cluster, request.space
    families, layouts, rejected = list_families(request)
    if not families:
        raise ConfigError(
            f"no way of assigning {cluster.num_devices} unequal devices suits global_batch={request.global_batch}; "
            f"choose a batch that more of {cluster.num_devices}'s divisors divide"
        )
    rows = np.concatenate(list(expand(families, np.ones(len(list_shardings(families)), np.bool_))))
    kinds = [_estimate_kind(kind, rows, request) for kind in list_kinds(cluster)]
    found = _assign_in_order(rows, kinds, request, rejected)
    if not found:
        raise InfeasibleError(_explain_memory(request, kinds))
    estimates = Estimates(
        rows[[assigned.row for assigned in found]],
        np.array([assigned.seconds for assigned in found]),
        np.array([assigned.num_bytes for assigned in found]),
        np.array([assigned.joules for assigned in found]),
    )
    placements = {tuple(rows[assigned.row]): assigned.placement for assigned in found}
    kept = apply_limits(estimates, request.limits, rejected)
    order, front = rank(kept)[: NUM_RUNNERS_UP + 1], find_front(kept)
    chosen = kept.take(np.concatenate([order, front]))
    details = detail_candidates(chosen, build_columns(chosen.rows, request), space)
    best, *others = details[: len(order)]
    return PlanningResult(
        best=best,
        front=tuple(details[len(order) :]),
        runners_up=tuple(compare(best, other) for other in others),
        num_candidates=len(rows),
        num_fitting=len(found),
        rejected_layouts=dict(+layouts),
        rejected_candidates=dict(+rejected),
        assumptions=(
            *list_assumptions(cluster, space),
            "unequal devices: items are those of even shares on the slowest kind; the front is over "
            "the plans that were assigned",
        ),
        software=space.software,
        placement=placements[tuple(chosen.rows[0])],
    )


def _estimate_kind(kind: Accelerator, rows: Table, request: Request[ModelShape]) -> _Kind:
    cluster = request.cluster
    equal = replace(cluster, nodes=tuple(Node(kind, node.gpus) for node in cluster.nodes))
    columns = build_columns(rows, replace(request, cluster=equal))
    columns = columns.with_columns(**{name: np.array([value]) for name, value in _describe_links(cluster).items()})
    times = predict_times(columns)
    one, two = (sum_items(measure_memory(_with_depth(columns, depth))) for depth in (1, 2))
    return _Kind(
        kind,
        sum_items(times),
        sum_items(times, _FIXED_ITEMS),
        sum_items(times, BUSY_ITEMS),
        one,
        np.maximum(two - one, 1.0),
    )


def _describe_links(cluster: Cluster) -> dict[str, float]:
    """Describe the links of the mixed cluster, which every kind shares."""
    return {
        "scale_up_size": float(cluster.scale_up_size),
        "gpus_per_node": float(cluster.gpus_per_node),
        "scale_up_alpha_s": cluster.scale_up.alpha_s,
        "scale_up_bandwidth": cluster.scale_up.bandwidth_bytes_per_s,
        "network_alpha_s": cluster.network.alpha_s,
        "network_bandwidth": cluster.network.bandwidth_bytes_per_s,
    }


def _with_depth(columns: Columns, depth: int) -> Columns:
    """Return the same plans with `depth` layers on each stage and the model's share of experts."""
    return columns.with_columns(
        layers=columns.pp * depth, moe_layers=columns.pp * depth * (columns.moe_layers / columns.layers)
    )


def _bound_seconds(rows: Table, kinds: Sequence[_Kind], cluster: Cluster) -> Array:
    """Return what no way of assigning a candidate can beat."""
    by_name = {kind.accelerator.name: kind for kind in kinds}
    bounds = np.empty(len(rows))
    blocks = np.where(rows[:, _PP] > 1, cluster.num_devices // rows[:, _PP], rows[:, _TP] * rows[:, _CP])
    for size, has_stages in {(int(size), bool(flag)) for size, flag in zip(blocks, rows[:, _PP] > 1, strict=True)}:
        chosen = (blocks == size) & ((rows[:, _PP] > 1) == has_stages)
        seconds = {
            name: kind.seconds[chosen] - (0.0 if has_stages else kind.fixed_s[chosen]) for name, kind in by_name.items()
        }
        slowest = [np.max([seconds[name] for name in block], axis=0) for block in cut_blocks(cluster, size)]
        ideal = len(slowest) / np.sum(1.0 / np.array(slowest), axis=0)
        fixed = 0.0 if has_stages else np.min([kind.fixed_s[chosen] for kind in kinds], axis=0)
        bounds[chosen] = ideal + fixed
    is_locked = (rows[:, _PP] == 1) & _meets_in_micro_batches(rows)
    return np.where(is_locked, np.max([kind.seconds for kind in kinds], axis=0), bounds)


def _meets_in_micro_batches(rows: Table) -> NDArray[np.bool_]:
    """Say whether replicas exchange something in every micro-batch, so that they must all have as many."""
    return np.asarray((rows[..., _ZERO] >= 2) | (rows[..., _EP] > 1))


def _assign_in_order(
    rows: Table, kinds: Sequence[_Kind], request: Request[ModelShape], rejected: Counter[str]
) -> list[_Assigned]:
    """Assign candidates in the order of their bounds until none can be among those shown."""
    bounds = _bound_seconds(rows, kinds, request.cluster)
    found: list[_Assigned] = []
    for index in map(int, np.argsort(bounds, kind="stable")):
        best = sorted(assigned.seconds for assigned in found if _is_within(assigned, request.limits))
        if len(best) > NUM_RUNNERS_UP and bounds[index] > best[NUM_RUNNERS_UP]:
            rejected["unequal devices: even assigned in ideal fractions, slower than those shown"] += 1
            continue
        on_kinds = {kind.accelerator.name: _take(kind, index) for kind in kinds}
        assign = _assign_stages if rows[index, _PP] > 1 else _assign_replicas
        assigned = assign(index, rows[index], on_kinds, request)
        if assigned is None:
            rejected["memory: unequal shares do not fit"] += 1
        else:
            found.append(assigned)
    return found


def _take(kind: _Kind, index: int) -> _OneOnKind:
    numbers = (kind.seconds, kind.fixed_s, kind.busy_s, kind.num_bytes, kind.layer_bytes)
    return _OneOnKind(kind.accelerator, *(float(values[index]) for values in numbers))


def _is_within(assigned: _Assigned, limits: Limits) -> bool:
    return limits.max_energy_j is None or assigned.joules <= limits.max_energy_j


def _assign_stages(
    index: int, row: Table, on_kinds: dict[str, _OneOnKind], request: Request[ModelShape]
) -> _Assigned | None:
    layers, stages = request.model.layers, int(row[_PP])
    size = request.cluster.num_devices // stages
    blocks = [[on_kinds[name] for name in block] for block in cut_blocks(request.cluster, size)]
    pace = [max(one.seconds for one in block) * stages / layers for block in blocks]
    room = [min(one.count_layers(request.limits) for one in block) for block in blocks]
    chunks = int(row[_CHUNKS])  # an interleaved stage gets as many layers in each of its chunks
    assigned = assign_layers([float(chunks)] * (layers // chunks), pace, [count // chunks for count in room])
    if assigned is None:
        return None
    depths, seconds = [depth * chunks for depth in assigned[0]], assigned[1]
    num_bytes = max(one.measure(depth) for block, depth in zip(blocks, depths, strict=True) for one in block)
    micro_batches = request.global_batch // int(row[_DP] * row[_SIZE])
    slowest = [_find_slowest(block) for block in blocks]
    shares = tuple(
        Share(stage * size, size, one.accelerator.name, depth, micro_batches)
        for stage, (one, depth) in enumerate(zip(slowest, depths, strict=True))
    )
    joules = _sum_joules(slowest, size, [depth * stages / layers for depth in depths], seconds)
    return _Assigned(index, seconds, num_bytes, joules, DeviceShares(shares, is_by_stage=True))


def _assign_replicas(
    index: int, row: Table, on_kinds: dict[str, _OneOnKind], request: Request[ModelShape]
) -> _Assigned | None:
    size, layers = int(row[_TP] * row[_CP]), request.model.layers
    blocks = [[on_kinds[name] for name in block] for block in cut_blocks(request.cluster, size)]
    if any(one.count_layers(request.limits) < layers for block in blocks for one in block):
        return None
    even = request.global_batch // int(row[_DP] * row[_SIZE])
    slowest = [_find_slowest(block) for block in blocks]
    batch_s = [(one.seconds - one.fixed_s) / even for one in slowest]
    counts = [even] * len(blocks) if _meets_in_micro_batches(row) else assign_batches(batch_s, even * len(blocks))
    seconds = max(count * one_s for count, one_s in zip(counts, batch_s, strict=True))
    seconds += max(one.fixed_s for one in slowest)
    num_bytes = max(one.measure(layers) for one in slowest)
    shares = tuple(
        Share(replica * size, size, one.accelerator.name, layers, count)
        for replica, (one, count) in enumerate(zip(slowest, counts, strict=True))
    )
    joules = _sum_joules(slowest, size, [count / even for count in counts], seconds)
    return _Assigned(index, seconds, num_bytes, joules, DeviceShares(shares, is_by_stage=False))


def _find_slowest(block: Sequence[_OneOnKind]) -> _OneOnKind:
    return max(block, key=lambda one: one.seconds)


def _sum_joules(kinds: Sequence[_OneOnKind], num_devices: int, parts: Sequence[float], seconds: float) -> float:
    """Add up devices that are busy for their kind's time, scaled by their part, and wait for the rest of the step."""
    total = 0.0
    for kind, part in zip(kinds, parts, strict=True):
        busy = min(kind.busy_s * part, seconds)
        total += num_devices * kind.accelerator.power_w * (busy + WAITING_POWER * (seconds - busy))
    return total if total else float("nan")


def _explain_memory(request: Request[ModelShape], kinds: Sequence[_Kind]) -> str:
    least = min(float(np.min(kind.num_bytes)) for kind in kinds)
    smallest = min(kind.accelerator.memory_bytes for kind in kinds)
    return (
        f"{request.model.name or 'the model'} does not fit on {request.cluster.num_devices} unequal devices, whose "
        f"smallest has {smallest / 1e9:.3g} GB, with any way of assigning layers or batches; one layer of the smallest "
        f"plan takes {least / 1e9:.3g} GB, so add nodes, or leave the smallest devices out"
    )
