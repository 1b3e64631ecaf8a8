"""When nothing fits: what is missing, and the nearest thing that would make it fit, found by search.

First the knobs that cost no machine are tried (wider choices, no headroom, the optimizer in the host's memory, a
shorter sequence), then more nodes, from few to many. Only memory is estimated, so an answer takes about as long as one
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
from deepseek.planning.search.estimates import STATE_ITEMS, sum_items
from deepseek.planning.search.request import Limits, Request, Space
from deepseek.planning.search.space import build_columns, build_plan, expand, list_families, list_shardings

_MOST_NODES = 4096
_EVERY_COUNT_TO = 16  # beyond, only 2**a * 3**b nodes: others divide too badly to be offered
_SHORTEST_SEQUENCE = 512


def explain_memory(request: Request[ModelShape]) -> str:
    """Say in one sentence how much memory the smallest plan needs, and what would make it fit."""
    needed, plan = find_least_memory(request)
    return (
        f"{request.model.name or 'the model'} does not fit on {_describe(request.cluster)}: the smallest plan "
        f"(tp={plan.tp}, pp={plan.pp}, "
        f"dp={plan.dp}, cp={plan.cp}, ZeRO {plan.zero_stage}, {plan.recomputation} recomputation) needs "
        f"{format_bytes(needed)} on a device and {format_bytes(request.memory_budget_bytes)} may be used; "
        + (find_remedy(request) or f"no number of nodes up to {_MOST_NODES} makes it fit, so take devices with more "
           "memory")
    )  # fmt: skip


def find_least_memory(request: Request[ModelShape]) -> tuple[float, Plan]:
    """Return bytes and plan of the smallest candidate; infinite bytes where no candidate divides."""
    families, _, _ = list_families(request)
    shardings = list_shardings(families)
    best, chosen = np.inf, Plan()
    if not families:
        return best, chosen
    state = sum_items(measure_memory(build_columns(shardings, request)), STATE_ITEMS)
    near = np.broadcast_to(state, len(shardings)) <= 3 * state.min()
    for rows in expand(families, near):
        needed = sum_items(measure_memory(build_columns(rows, request)))
        index = int(np.argmin(needed))
        if needed[index] < best:
            best, chosen = float(needed[index]), build_plan(rows[index], request.space)
    return best, chosen


def _fits(request: Request[ModelShape]) -> bool:
    return find_least_memory(request)[0] <= request.memory_budget_bytes


def find_remedy(request: Request[ModelShape]) -> str:
    """Name the first knob that makes the model fit, else the smallest cluster of the same nodes, else nothing."""
    space = request.space
    wide = Space(precision=space.precision, software=space.software)
    if space != wide and _fits(replace(request, space=wide)):
        return "allow all plans: with the whole space it fits"
    headroom = request.limits.memory_headroom
    if headroom and _fits(replace(request, limits=Limits())):
        return f"it fits with all of the memory, without the headroom of {headroom:.0%}"
    nodes = _find_nodes(request)
    on_nodes = f"it fits on {_describe(nodes)}" if nodes else ""
    offloading = replace(space, software=replace(space.software, offloads_optimizer=True))
    if _fits(replace(request, space=offloading)):
        return "keep the optimizer in the host's memory (offloads_optimizer)" + (f", or {on_nodes}" if nodes else "")
    for sequence in _halve(request.model.sequence):
        if _fits(replace(request, model=request.model.with_sequence(sequence))):
            return f"it fits with sequences of {sequence} tokens" + (f", or {on_nodes}" if nodes else "")
    return on_nodes


def _find_nodes(request: Request[ModelShape]) -> Cluster | None:
    wide = replace(request.space, tp=(), pp=(), dp=(), cp=(), ep=())
    for count in _list_counts(len(request.cluster.nodes)):
        larger = replace(request.cluster, nodes=(request.cluster.nodes[0],) * count)
        if _fits(replace(request, cluster=larger, space=wide)):
            return larger
    return None


def _list_counts(nodes: int) -> Iterator[int]:
    smooth = {2**a * 3**b for a in range(13) for b in range(8)} | set(range(1, _EVERY_COUNT_TO + 1))
    return iter(sorted(count for count in smooth if nodes < count <= _MOST_NODES))


def _halve(sequence: int) -> Iterator[int]:
    while sequence % 2 == 0 and sequence // 2 >= _SHORTEST_SEQUENCE:
        sequence //= 2
        yield sequence


def _describe(cluster: Cluster) -> str:
    kinds = Counter((node.accelerator.name, node.gpus) for node in cluster.nodes)
    return " and ".join(f"{count} node{'s' * (count > 1)} of {gpus} {name}" for (name, gpus), count in kinds.items())
