"""The space that the planner searches, as integer tables: one row per plan, one column per knob.

A *layout* is how devices are assigned: tensor x pipeline x context x data = all devices. Each layout is crossed with
how the state is sharded (ZeRO stage, experts) and with how work passes through it (micro-batch, schedule, chunks per
stage, recomputation). `list_families` applies the rules of divisibility and counts what each rejects; `expand` builds
the rows.

Two knobs are derived and not searched: sequence parallelism is on wherever tensor parallelism is and the sequence can
be cut, and ZeRO 3 shards over all data ranks or over those of one scale-up domain. Stages may differ by a layer where
the depth does not divide; interleaved stages may not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from deepseek.core.divisors import list_divisors
from deepseek.distributed.plan import RECOMPUTATIONS, SCHEDULES, Plan, Schedule
from deepseek.planning.estimate.columns import Columns, spread_plans
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.search.request import Request, Space

Table = NDArray[np.int32]
KNOBS = (
    "tp", "pp", "cp", "dp", "sequence_parallel", "ep", "etp", "zero_stage", "shard_group", "micro_batch_size",
    "schedule", "virtual_stages", "recomputation",
)  # fmt: skip
_NUM_LAYOUT_KNOBS, _NUM_SHARDING_KNOBS = 5, 4
_GPIPE, _ONE_F_ONE_B, _INTERLEAVED, _ZERO_BUBBLE = map(SCHEDULES.index, ("gpipe", "1f1b", "interleaved", "zero_bubble"))


@dataclass(frozen=True)
class PlanFamily:
    """Plans of one layout: every row of `sharding` with every row of `passing`."""

    layout: tuple[int, ...]
    sharding: tuple[tuple[int, ...], ...]
    passing: tuple[tuple[int, ...], ...]

    @property
    def num_candidates(self) -> int:
        """Number of plans."""
        return len(self.sharding) * len(self.passing)


def list_families(request: Request[ModelShape]) -> tuple[list[PlanFamily], Counter[str], Counter[str]]:
    """List the families that divide, and count by rule how many layouts and how many candidates do not."""
    model, space = request.model, request.space
    families: list[PlanFamily] = []
    layouts: Counter[str] = Counter()
    candidates: Counter[str] = Counter()
    for layout in _list_layouts(request.cluster.num_devices):
        rule = _find_broken_rule(layout, request)
        if rule:
            layouts[rule] += 1
            continue
        tp, pp, cp, dp = layout
        has_sequence = tp > 1 and model.sequence % (cp * tp) == 0
        passing = _list_passing(model, pp, request.global_batch // dp, space, candidates)
        sharding = _list_sharding(request, layout, candidates, len(passing))
        if passing and sharding:
            families.append(PlanFamily((*layout, int(has_sequence)), tuple(sharding), tuple(passing)))
        else:
            layouts["the space allows no sharding, micro-batch or schedule here"] += 1
    return families, layouts, candidates


def _list_layouts(num_devices: int) -> Iterator[tuple[int, int, int, int]]:
    for tp in list_divisors(num_devices):
        for pp in list_divisors(num_devices // tp):
            for cp in list_divisors(num_devices // (tp * pp)):
                yield tp, pp, cp, num_devices // (tp * pp * cp)


def _find_broken_rule(layout: tuple[int, int, int, int], request: Request[ModelShape]) -> str:
    tp, pp, cp, dp = layout
    model, space = request.model, request.space
    rules = (
        (any(not space.allows(name, value) for name, value in zip(("tp", "pp", "cp", "dp"), layout, strict=True)),
         "outside the space that was asked for"),
        (model.heads % tp, "tp does not divide the heads"),
        (model.sequence % cp, "cp does not divide the sequence"),
        (pp > model.layers, "more stages than layers"),
        (request.global_batch % dp, "dp does not divide the global batch"),
        (not _can_cut(model.layers, pp), "the last stage would be empty"),
    )  # fmt: skip
    return next((rule for is_broken, rule in rules if is_broken), "")


def _can_cut(layers: int, pp: int) -> bool:
    """Say whether the first and last stage keep a layer where the middle ones have the rounded up number."""
    slots = -(-layers // pp)
    missing = slots * pp - layers
    return missing == 0 or -(-missing // 2) < slots


def _list_passing(
    model: ModelShape, pp: int, batch: int, space: Space, rejected: Counter[str]
) -> list[tuple[int, int, int, int]]:
    """List (micro-batch, schedule, chunks, recomputation) for replicas that see `batch` sequences in a step."""
    rows = []
    recomputations = [RECOMPUTATIONS.index(word) for word in space.recomputations]
    for size in list_divisors(batch):
        if space.allows("micro_batch_sizes", size):
            schedules = _list_schedules(model, pp, batch // size, space, rejected)
            rows += [(size, *schedule, again) for schedule in schedules for again in recomputations]
    return rows


def _list_schedules(
    model: ModelShape, pp: int, micro_batches: int, space: Space, rejected: Counter[str]
) -> list[tuple[int, int]]:
    if pp == 1:
        return [(_ONE_F_ONE_B, 1)] if space.allows("virtual_stages", 1) else []
    asked = {SCHEDULES.index(word) for word in space.schedules}
    rows = [(schedule, 1) for schedule in (_GPIPE, _ONE_F_ONE_B, _ZERO_BUBBLE) if schedule in asked]
    if {_GPIPE, _ONE_F_ONE_B} <= asked:
        rows.remove((_GPIPE, 1))  # the same time, and never fewer micro-batches in memory
        rejected["gpipe: 1f1b takes the same time and no more memory"] += len(space.recomputations)
    if not space.allows("virtual_stages", 1):
        rows = []
    if _INTERLEAVED in asked and model.layers % pp == 0:
        chunks = [
            count for count in list_divisors(model.layers // pp) if count > 1 and space.allows("virtual_stages", count)
        ]
        if micro_batches % pp == 0:
            rows += [(_INTERLEAVED, count) for count in chunks]
        else:
            rejected["interleaved: micro-batches are no multiple of pp"] += len(chunks) * len(space.recomputations)
    return rows


def _list_sharding(
    request: Request[ModelShape], layout: tuple[int, int, int, int], rejected: Counter[str], num_passing: int
) -> list[tuple[int, int, int, int]]:
    """List (ep, etp, ZeRO stage, shard group)."""
    tp, pp, cp, dp = layout
    model, space = request.model, request.space
    stages = [stage for stage in space.zero_stages if stage == 0 or dp * cp > 1]
    kept = [stage for stage in stages if stage < 2 or pp == 1]
    experts = list(_list_expert_layouts(model, tp, cp * dp, space))
    rejected["ZeRO 2 and 3 gather per micro-batch and exclude pipelines"] += (
        (len(stages) - len(kept)) * len(experts) * num_passing
    )
    groups = {stage: [0, *_list_shard_groups(request.cluster, layout)] if stage == 3 else [0] for stage in kept}
    return [(ep, etp, stage, group) for ep, etp in experts for stage in kept for group in groups[stage]]


def _list_expert_layouts(model: ModelShape, tp: int, copies: int, space: Space) -> Iterator[tuple[int, int]]:
    if not model.experts:
        if space.allows("ep", 1):
            yield 1, 1
        return
    for ep in list_divisors(model.experts):
        for etp in sorted({1, tp}):
            if space.allows("ep", ep) and (tp * copies) % (ep * etp) == 0:
                yield ep, etp


def _list_shard_groups(cluster: Cluster, layout: tuple[int, int, int, int]) -> list[int]:
    tp, _, cp, dp = layout
    size, left = divmod(cluster.scale_up_size, tp * cp)
    return [size] if not left and 1 < size < dp and dp % size == 0 else []


def list_shardings(families: Sequence[PlanFamily]) -> Table:
    """Build one row per (layout, sharding) with the cheapest way of passing, in the order of the families."""
    rows = [(*family.layout, *sharding, 1, _ONE_F_ONE_B, 1, 0) for family in families for sharding in family.sharding]
    return np.array(rows, dtype=np.int32).reshape(-1, len(KNOBS))


def expand(families: Sequence[PlanFamily], is_kept: NDArray[np.bool_], chunk_rows: int = 50_000) -> Iterator[Table]:
    """Yield tables of about `chunk_rows` candidates; `is_kept` has one entry per row of `list_shardings`."""
    pending: list[Table] = []
    size = start = 0
    for family in families:
        kept = is_kept[start : start + len(family.sharding)]
        start += len(family.sharding)
        if kept.any():
            pending.append(_cross(family, kept))
            size += len(pending[-1])
        if size >= chunk_rows:
            yield np.concatenate(pending)
            pending, size = [], 0
    if pending:
        yield np.concatenate(pending)


def _cross(family: PlanFamily, is_kept: NDArray[np.bool_]) -> Table:
    sharding = np.array(family.sharding, dtype=np.int32)[is_kept]
    passing = np.array(family.passing, dtype=np.int32)
    table = np.empty((len(sharding) * len(passing), len(KNOBS)), dtype=np.int32)
    end = _NUM_LAYOUT_KNOBS + _NUM_SHARDING_KNOBS
    table[:, :_NUM_LAYOUT_KNOBS] = family.layout
    table[:, _NUM_LAYOUT_KNOBS:end] = np.repeat(sharding, len(passing), axis=0)
    table[:, end:] = np.tile(passing, (len(sharding), 1))
    return table


def build_columns(table: Table, request: Request[ModelShape]) -> Columns:
    """Build the columns that `predict_columns` reads, one row per candidate."""
    base = Plan(precision=request.space.precision)
    varied = {name: table[:, index].astype(np.float64) for index, name in enumerate(KNOBS)}
    return spread_plans(request.model, request.cluster, base, request.global_batch, varied, request.space.software)


def build_plan(row: NDArray[np.int32], space: Space) -> Plan:
    """Build the plan that a row stands for."""
    values = dict(zip(KNOBS, map(int, row), strict=True))
    return Plan(
        tp=values["tp"],
        pp=values["pp"],
        dp=values["dp"],
        ep=values["ep"],
        cp=values["cp"],
        etp=values["etp"],
        zero_stage=values["zero_stage"],
        recomputation=RECOMPUTATIONS[values["recomputation"]],
        micro_batch_size=values["micro_batch_size"],
        schedule=get_args(Schedule)[values["schedule"]],
        virtual_stages=values["virtual_stages"],
        sequence_parallel=bool(values["sequence_parallel"]),
        precision=space.precision,
        shard_group=values["shard_group"],
    )
