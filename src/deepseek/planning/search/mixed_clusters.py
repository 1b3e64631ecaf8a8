"""The search on a cluster of unequal devices: which plan, and how much of it each stage or replica gets.

Every candidate is priced once per kind of accelerator, as if all devices were of that kind. What a kind would take
bounds a mixture from below (all layers or micro-batches dealt in ideal fractions), so candidates are taken in the
order of that bound and dealt exactly (`balancing`) until no bound is below the eleventh best found: the answer is
exact.

With a pipeline, stages are blocks of neighbouring devices and get layers by speed and memory; a stage that holds
several kinds goes at the pace of its slowest. Without one, replicas get micro-batches by speed, unless they meet in
every micro-batch (ZeRO 2 and 3, experts): then all take the same number at the pace of the slowest. Priced so: a
stage's whole step, its wait for the pipeline included, grows with its layers, which is exact where stages end up
equally busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deepseek.core.errors import ConfigError
from deepseek.planning.estimate.columns import Array, Columns
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.estimate.step import predict_times
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.search.balancing import Placement, Share, cut_blocks, deal_batches, deal_layers, list_kinds
from deepseek.planning.search.planner import (
    BUSY_ITEMS,
    NUM_RUNNERS_UP,
    WAITING_POWER,
    Limits,
    PlanningResult,
    Prices,
    apply_limits,
    compare,
    detail_candidates,
    find_front,
    list_assumptions,
    order_prices,
    sum_items,
)
from deepseek.planning.search.space import (
    KNOBS,
    Space,
    Table,
    expand,
    list_families,
    list_shardings,
    make_columns,
)

_PP, _TP, _CP, _DP, _EP, _ZERO, _SIZE, _CHUNKS = (
    KNOBS.index(name) for name in ("pp", "tp", "cp", "dp", "ep", "zero_stage", "micro_batch_size", "virtual_stages")
)
_FIXED_ITEMS = ("data_parallel", "optimizer")  # once per step, however many micro-batches a replica gets


@dataclass(frozen=True)
class _Kind:
    """All candidates priced on one kind of accelerator: seconds, of which fixed and busy, and bytes by stage depth."""

    accelerator: Accelerator
    seconds: Array
    fixed_s: Array
    busy_s: Array
    num_bytes: Array
    layer_bytes: Array

    def take(self, place: int) -> tuple[float, float, float, float, float]:
        """The numbers of one candidate."""
        names = ("seconds", "fixed_s", "busy_s", "num_bytes", "layer_bytes")
        return tuple(float(getattr(self, name)[place]) for name in names)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Dealt:
    """One candidate laid over the devices."""

    row: int
    seconds: float
    num_bytes: float
    joules: float
    placement: Placement


def plan_mixed(model: ModelShape, cluster: Cluster, global_batch: int, limits: Limits, space: Space) -> PlanningResult:
    """The same result as `planner.plan`, for a cluster of several kinds of devices, with a `placement`."""
    families, layouts, rejected = list_families(model, cluster, global_batch, space)
    if not families:
        raise ConfigError(
            f"no way of dealing {cluster.num_devices} unequal devices suits global_batch={global_batch}; "
            f"choose a batch that more of {cluster.num_devices}'s divisors divide"
        )
    rows = np.concatenate(list(expand(families, np.ones(len(list_shardings(families)), np.bool_))))
    kinds = [_price_kind(kind, rows, model, cluster, global_batch, space) for kind in list_kinds(cluster)]
    bounds = _bound_seconds(rows, kinds, cluster)
    dealt = _deal_in_order(rows, kinds, bounds, model, cluster, global_batch, limits, rejected)
    if not dealt:
        raise ConfigError(_explain_memory(model, cluster, kinds))
    prices = Prices(
        rows[[each.row for each in dealt]],
        np.array([each.seconds for each in dealt]),
        np.array([each.num_bytes for each in dealt]),
        np.array([each.joules for each in dealt]),
    )
    placements = {tuple(rows[each.row]): each.placement for each in dealt}
    kept = apply_limits(prices, limits, rejected)
    order, front = order_prices(kept)[: NUM_RUNNERS_UP + 1], find_front(kept)
    chosen = kept.take(np.concatenate([order, front]))
    columns = make_columns(chosen.rows, model, cluster, global_batch, space)
    details = detail_candidates(chosen, columns, space)
    best, *others = details[: len(order)]
    return PlanningResult(
        best=best,
        front=tuple(details[len(order) :]),
        runners_up=tuple(compare(best, other) for other in others),
        num_candidates=len(rows),
        num_fitting=len(dealt),
        rejected_layouts=dict(+layouts),
        rejected_candidates=dict(+rejected),
        assumptions=(
            *list_assumptions(cluster, space),
            "unequal devices: items are those of even shares on the slowest kind; the front is over "
            "the plans that were dealt",
        ),
        software=space.software,
        placement=placements[tuple(chosen.rows[0])],
    )


def _price_kind(
    kind: Accelerator, rows: Table, model: ModelShape, cluster: Cluster, global_batch: int, space: Space
) -> _Kind:
    alike = replace(cluster, nodes=tuple(Node(kind, node.gpus) for node in cluster.nodes))
    columns = make_columns(rows, model, alike, global_batch, space)
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
    """Links are shared, so every kind is priced with those of the mixed cluster."""
    return {
        "scale_up_size": float(cluster.scale_up_size),
        "gpus_per_node": float(cluster.gpus_per_node),
        "scale_up_alpha_s": cluster.scale_up.alpha_s,
        "scale_up_bandwidth": cluster.scale_up.bandwidth_bytes_per_s,
        "network_alpha_s": cluster.network.alpha_s,
        "network_bandwidth": cluster.network.bandwidth_bytes_per_s,
    }


def _with_depth(columns: Columns, depth: int) -> Columns:
    """The same plans with `depth` layers on each stage and the model's share of experts."""
    return columns.with_columns(
        layers=columns.pp * depth, moe_layers=columns.pp * depth * (columns.moe_layers / columns.layers)
    )


def _bound_seconds(rows: Table, kinds: Sequence[_Kind], cluster: Cluster) -> Array:
    """No way of dealing a candidate takes less than this."""
    names = [kind.accelerator.name for kind in kinds]
    bounds = np.empty(len(rows))
    blocks = np.where(rows[:, _PP] > 1, cluster.num_devices // rows[:, _PP], rows[:, _TP] * rows[:, _CP])
    for size, has_stages in {(int(size), bool(flag)) for size, flag in zip(blocks, rows[:, _PP] > 1, strict=True)}:
        chosen = (blocks == size) & ((rows[:, _PP] > 1) == has_stages)
        slowest = [
            np.max(
                [
                    kinds[names.index(name)].seconds[chosen]
                    - (0.0 if has_stages else kinds[names.index(name)].fixed_s[chosen])
                    for name in block
                ],
                axis=0,
            )
            for block in cut_blocks(cluster, size)
        ]
        ideal = len(slowest) / np.sum(1.0 / np.array(slowest), axis=0)
        fixed = 0.0 if has_stages else np.min([kind.fixed_s[chosen] for kind in kinds], axis=0)
        bounds[chosen] = ideal + fixed
    is_locked = (rows[:, _PP] == 1) & _meets_in_micro_batches(rows)
    return np.where(is_locked, np.max([kind.seconds for kind in kinds], axis=0), bounds)


def _meets_in_micro_batches(rows: Table) -> NDArray[np.bool_]:
    """Whether replicas exchange something in every micro-batch, so that they must all have as many."""
    return np.asarray((rows[..., _ZERO] >= 2) | (rows[..., _EP] > 1))


def _deal_in_order(
    rows: Table,
    kinds: Sequence[_Kind],
    bounds: Array,
    model: ModelShape,
    cluster: Cluster,
    global_batch: int,
    limits: Limits,
    rejected: Counter[str],
) -> list[_Dealt]:
    by_name = {kind.accelerator.name: kind for kind in kinds}
    found: list[_Dealt] = []
    for row in np.argsort(bounds, kind="stable"):
        best = sorted(each.seconds for each in found if _is_within(each, limits))
        if len(best) > NUM_RUNNERS_UP and bounds[row] > best[NUM_RUNNERS_UP]:
            rejected["unequal devices: even dealt in ideal fractions, slower than those shown"] += 1
            continue
        deal = _deal_stages if rows[row, _PP] > 1 else _deal_replicas
        dealt = deal(int(row), rows[row], by_name, model, cluster, global_batch, limits)
        if dealt is None:
            rejected["memory: unequal shares do not fit"] += 1
        else:
            found.append(dealt)
    return found


def _is_within(dealt: _Dealt, limits: Limits) -> bool:
    return limits.max_energy_j is None or dealt.joules <= limits.max_energy_j


def _deal_stages(
    place: int,
    row: Table,
    kinds: dict[str, _Kind],
    model: ModelShape,
    cluster: Cluster,
    global_batch: int,
    limits: Limits,
) -> _Dealt | None:
    size = cluster.num_devices // int(row[_PP])
    blocks = cut_blocks(cluster, size)
    pace = [max(kinds[name].seconds[place] for name in block) * int(row[_PP]) / model.layers for block in blocks]
    room = [min(_count_layers(kinds[name], place, limits) for name in block) for block in blocks]
    chunks = int(row[_CHUNKS])  # an interleaved stage gets as many layers in each of its chunks
    dealt = deal_layers([float(chunks)] * (model.layers // chunks), pace, [each // chunks for each in room])
    if dealt is None:
        return None
    depths, seconds = [each * chunks for each in dealt[0]], dealt[1]
    num_bytes = max(
        float(kinds[name].num_bytes[place] + (depth - 1) * kinds[name].layer_bytes[place])
        for block, depth in zip(blocks, depths, strict=True)
        for name in block
    )
    micro_batches = global_batch // int(row[_DP] * row[_SIZE])
    shares = tuple(
        Share(stage * size, size, _name_slowest(block, kinds, place), depth, micro_batches)
        for stage, (block, depth) in enumerate(zip(blocks, depths, strict=True))
    )
    parts = [depth * int(row[_PP]) / model.layers for depth in depths]
    return _Dealt(
        place, seconds, num_bytes, _price_joules(shares, parts, kinds, place, seconds), Placement(shares, True)
    )


def _deal_replicas(
    place: int,
    row: Table,
    kinds: dict[str, _Kind],
    model: ModelShape,
    cluster: Cluster,
    global_batch: int,
    limits: Limits,
) -> _Dealt | None:
    size = int(row[_TP] * row[_CP])
    blocks = cut_blocks(cluster, size)
    if any(_count_layers(kinds[name], place, limits) < model.layers for block in blocks for name in block):
        return None
    even = global_batch // int(row[_DP] * row[_SIZE])
    names = [_name_slowest(block, kinds, place) for block in blocks]
    fixed = max(float(kinds[name].fixed_s[place]) for name in names)
    each = [float(kinds[name].seconds[place] - kinds[name].fixed_s[place]) / even for name in names]
    total = even * len(blocks)
    counts = [even] * len(blocks) if _meets_in_micro_batches(row) else deal_batches(each, total)
    seconds = max(count * one for count, one in zip(counts, each, strict=True)) + fixed
    num_bytes = max(
        float(kinds[name].num_bytes[place] + (model.layers - 1) * kinds[name].layer_bytes[place]) for name in names
    )
    shares = tuple(
        Share(index * size, size, name, model.layers, count)
        for index, (name, count) in enumerate(zip(names, counts, strict=True))
    )
    parts = [count / even for count in counts]
    return _Dealt(
        place, seconds, num_bytes, _price_joules(shares, parts, kinds, place, seconds), Placement(shares, False)
    )


def _count_layers(kind: _Kind, place: int, limits: Limits) -> int:
    """Layers that one stage of a candidate has room for on this kind of device."""
    free = kind.accelerator.memory_bytes * (1.0 - limits.memory_headroom) - kind.num_bytes[place]
    return int(free // kind.layer_bytes[place]) + 1 if free >= 0 else 0


def _name_slowest(block: tuple[str, ...], kinds: dict[str, _Kind], place: int) -> str:
    return max(block, key=lambda name: float(kinds[name].seconds[place]))


def _price_joules(
    shares: Sequence[Share], parts: Sequence[float], kinds: dict[str, _Kind], place: int, seconds: float
) -> float:
    """Each device is busy for its kind's time, scaled by its share, and waits for the rest of the step."""
    total = 0.0
    for share, part in zip(shares, parts, strict=True):
        kind = kinds[share.accelerator]
        busy = min(float(kind.busy_s[place]) * part, seconds)
        total += share.num_devices * kind.accelerator.power_w * (busy + WAITING_POWER * (seconds - busy))
    return total if total else float("nan")


def _explain_memory(model: ModelShape, cluster: Cluster, kinds: Sequence[_Kind]) -> str:
    least = min(float(np.min(kind.num_bytes)) for kind in kinds)
    smallest = min(kind.accelerator.memory_bytes for kind in kinds)
    return (
        f"{model.name or 'the model'} does not fit on {cluster.num_devices} unequal devices, whose smallest has "
        f"{smallest / 1e9:.3g} GB, with any way of dealing layers or batches; one layer of the smallest plan takes "
        f"{least / 1e9:.3g} GB, so add nodes, or leave the smallest devices out"
    )
