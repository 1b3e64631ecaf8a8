"""When nothing fits: what is missing, and the nearest thing that would make it fit, found by search.

First the knobs that cost no machine are tried (wider choices, no headroom, the optimizer in the host's memory, a
shorter sequence), then more nodes, from few to many. Only memory is priced, so an answer takes about as long as one
search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from deepseek.core.units import format_bytes
from deepseek.distributed.plan import Plan
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.search.planner import STATE_ITEMS, Limits, memory_budget, sum_items
from deepseek.planning.search.space import Space, expand, list_families, list_shardings, make_columns, make_plan

_MOST_NODES = 4096
_EVERY_COUNT_TO = 16  # beyond, only 2**a * 3**b nodes: others divide too badly to be offered
_SHORTEST_SEQUENCE = 512


def explain_memory(model: ModelShape, cluster: Cluster, global_batch: int, limits: Limits, space: Space) -> str:
    """One sentence: the least memory any plan needs, and what would make it fit."""
    budget = memory_budget(cluster, limits)
    needed, plan = find_least_memory(model, cluster, global_batch, space)
    return (
        f"{model.name or 'the model'} does not fit on {_describe(cluster)}: the smallest plan "
        f"(tp={plan.tp}, pp={plan.pp}, "
        f"dp={plan.dp}, cp={plan.cp}, ZeRO {plan.zero_stage}, {plan.recomputation} recomputation) needs "
        f"{format_bytes(needed)} on a device and {format_bytes(budget)} may be used; "
        + (find_remedy(model, cluster, global_batch, limits, space) or "no number of nodes up to "
           f"{_MOST_NODES} makes it fit, so take devices with more memory")
    )  # fmt: skip


def find_least_memory(model: ModelShape, cluster: Cluster, global_batch: int, space: Space) -> tuple[float, Plan]:
    """Bytes and plan of the smallest candidate; infinite bytes where no candidate divides."""
    families, _, _ = list_families(model, cluster, global_batch, space)
    shardings = list_shardings(families)
    best, chosen = np.inf, Plan()
    if not families:
        return best, chosen
    state = sum_items(measure_memory(make_columns(shardings, model, cluster, global_batch, space)), STATE_ITEMS)
    near = np.broadcast_to(state, len(shardings)) <= 3 * state.min()
    for rows in expand(families, near):
        needed = sum_items(measure_memory(make_columns(rows, model, cluster, global_batch, space)))
        place = int(np.argmin(needed))
        if needed[place] < best:
            best, chosen = float(needed[place]), make_plan(rows[place], space)
    return best, chosen


def find_remedy(model: ModelShape, cluster: Cluster, global_batch: int, limits: Limits, space: Space) -> str:
    """The first knob that makes `model` fit, else the smallest cluster of the same nodes, else nothing."""

    def fits(model: ModelShape, cluster: Cluster, limits: Limits, space: Space) -> bool:
        return find_least_memory(model, cluster, global_batch, space)[0] <= memory_budget(cluster, limits)

    wide = Space(precision=space.precision, software=space.software)
    if space != wide and fits(model, cluster, limits, wide):
        return "allow all plans: with the whole space it fits"
    if limits.memory_headroom and fits(model, cluster, Limits(), space):
        return f"it fits without memory_headroom={limits.memory_headroom:g}"
    nodes = _find_nodes(model, cluster, global_batch, limits, space)
    on_nodes = f"it fits on {_describe(nodes)}" if nodes else ""
    offloading = replace(space, software=replace(space.software, offloads_optimizer=True))
    if fits(model, cluster, limits, offloading):
        return "keep the optimizer in the host's memory (offloads_optimizer)" + (f", or {on_nodes}" if nodes else "")
    for sequence in _halve(model.sequence):
        if fits(model.with_sequence(sequence), cluster, limits, space):
            return f"it fits with sequences of {sequence} tokens" + (f", or {on_nodes}" if nodes else "")
    return on_nodes


def _find_nodes(model: ModelShape, cluster: Cluster, global_batch: int, limits: Limits, space: Space) -> Cluster | None:
    wide = replace(space, tp=(), pp=(), dp=(), cp=(), ep=())
    for count in _list_counts(len(cluster.nodes)):
        larger = replace(cluster, nodes=(cluster.nodes[0],) * count)
        if find_least_memory(model, larger, global_batch, wide)[0] <= memory_budget(larger, limits):
            return larger
    return None


def _list_counts(nodes: int) -> Iterator[int]:
    smooth = {2**a * 3**b for a in range(13) for b in range(8)} | set(range(1, _EVERY_COUNT_TO + 1))
    return iter(sorted(each for each in smooth if nodes < each <= _MOST_NODES))


def _halve(sequence: int) -> Iterator[int]:
    while sequence % 2 == 0 and sequence // 2 >= _SHORTEST_SEQUENCE:
        sequence //= 2
        yield sequence


def _describe(cluster: Cluster) -> str:
    kinds = Counter((node.accelerator.name, node.gpus) for node in cluster.nodes)
    return " and ".join(f"{count} nodes of {gpus} {name}" for (name, gpus), count in kinds.items())
