"""Which plans can run on a model: rules in one sentence each, and the nearest plan that keeps all of them.

`planning/feasibility.py` asks whether a plan fits a cluster and a batch; here it is held against what the runtime can
do with a model's parts. Pure values, no tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from deepseek.core.divisors import explain_division, list_divisors
from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan


@dataclass(frozen=True)
class ModelParts:
    """What a plan may cut of a model."""

    name: str
    """Class of the model, for sentences."""
    num_layers: int = 0
    """Blocks that a pipeline may spread; 0 where it cannot take the model apart."""
    head_counts: tuple[tuple[str, int], ...] = ()
    """Numbers that tensor parallelism divides: `(("num_heads", 8), ("num_kv_heads", 2))`."""
    num_experts: int = 0
    """Experts of a layer; 0 for a dense model."""
    has_tensor_rows: bool = False
    """Whether it is known which layers tensor parallelism cuts."""
    has_sequence_rows: bool = False
    """Whether sequences may be cut between those layers."""
    has_context_rows: bool = False
    """Whether it is known how tokens see those of other ranks."""


def check_plan_runs(plan: Plan, parts: ModelParts) -> None:
    """Raise a `ConfigError` with the rule and the nearest legal plan unless `plan` can run on such a model."""
    reason = explain_illegal(plan, parts)
    if reason is not None:
        nearest = find_nearest_legal(plan, parts)
        hint = f"; the nearest plan that runs on {plan.num_devices} ranks is {describe(nearest)}" if nearest else ""
        raise ConfigError(f"{reason}{hint}")


def explain_illegal(plan: Plan, parts: ModelParts) -> str | None:
    """Say in one sentence which rule `plan` breaks, or return `None`.

    >>> explain_illegal(Plan(pp=2, zero_stage=3), ModelParts("Decoder", num_layers=4))
    'zero_stage=3 gathers weights for every micro-batch and excludes pp=2; use zero_stage=1'
    """
    return _explain_unknown_parts(plan, parts) or _explain_sizes(plan, parts) or _explain_combination(plan)


def _explain_unknown_parts(plan: Plan, parts: ModelParts) -> str | None:
    if plan.tp > 1 and not parts.has_tensor_rows:
        return f"tp={plan.tp} needs to know which layers of {parts.name} to cut; give rows, or use tp=1"
    if plan.tp > 1 and plan.sequence_parallel and not parts.has_sequence_rows:
        return f"sequence_parallel cuts sequences, and no rows say where {parts.name} has them; leave it out"
    if plan.cp > 1 and not parts.has_context_rows:
        return f"cp={plan.cp} cuts sequences, and no rows say how tokens of {parts.name} see each other; use cp=1"
    if plan.pp > 1 and not parts.num_layers:
        return f"pp={plan.pp} needs to know the layers of {parts.name}, which has no stages described; use pp=1"
    if plan.ep > 1 and not parts.num_experts:
        return f"ep={plan.ep} needs a model with experts and {parts.name} has none; use ep=1"
    return None


def _explain_sizes(plan: Plan, parts: ModelParts) -> str | None:
    for name, count in parts.head_counts:
        if count % plan.tp:
            return explain_division("tp", plan.tp, name, count)
    num_stages = plan.pp * plan.virtual_stages
    if plan.pp > 1 and num_stages > parts.num_layers:
        return f"pp*virtual_stages = {num_stages} is more than layers={parts.num_layers}; use fewer stages"
    if plan.ep > 1 and parts.num_experts % plan.ep:
        return explain_division("ep", plan.ep, "experts", parts.num_experts)
    if plan.dp % plan.ep:
        return (
            f"ep={plan.ep} spreads experts over data parallel ranks and does not divide dp={plan.dp}; choose a divisor"
        )
    return None


def _explain_combination(plan: Plan) -> str | None:
    rules = (
        (
            plan.pp > 1 and plan.zero_stage >= 2,
            f"zero_stage={plan.zero_stage} gathers weights for every micro-batch and excludes pp={plan.pp}; "
            "use zero_stage=1",
        ),
        (plan.etp > 1, f"etp={plan.etp} cuts inside experts, which is not there yet; use etp=1"),
        (
            plan.schedule == "zero_bubble" and plan.pp > 1 and plan.zero_stage > 0,
            f"schedule='zero_bubble' computes weight gradients after ZeRO has reduced them and excludes "
            f"zero_stage={plan.zero_stage}; use zero_stage=0 or schedule='1f1b'",
        ),
        (
            plan.sequence_parallel and plan.tp == 1,
            "sequence_parallel cuts sequences over tensor parallel ranks and tp=1; leave it out",
        ),
        (
            plan.shard_group > 0 and plan.zero_stage == 0,
            f"shard_group={plan.shard_group} says who shares weights and zero_stage=0 shares none; leave one out",
        ),
        (
            plan.shard_group > 0 and plan.cp > 1,
            f"shard_group={plan.shard_group} counts data parallel ranks, and with cp={plan.cp} weights are shared over "
            "dp*cp; leave shard_group out",
        ),
    )
    return next((sentence for is_broken, sentence in rules if is_broken), None)


def find_nearest_legal(plan: Plan, parts: ModelParts) -> Plan | None:
    """Find the legal plan for as many ranks that is least unlike `plan`."""
    legal = [candidate for candidate in _list_candidates(plan) if explain_illegal(candidate, parts) is None]
    return min(legal, key=lambda candidate: _measure_distance(plan, candidate), default=None)


def list_nearest(plan: Plan, parts: ModelParts, num_ranks: int, *, limit: int = 3) -> list[Plan]:
    """List the plans for `num_ranks` ranks that can run on such a model and are least unlike `plan`.

    >>> [describe(found) for found in list_nearest(Plan(dp=4, zero_stage=1), ModelParts("Mine"), 2)]
    ['dp=2 zero_stage=1', 'dp=2', 'dp=2 zero_stage=2']
    """
    return sorted(list_plans(parts, num_ranks), key=lambda other: _measure_distance(plan, other))[:limit]


def _list_candidates(plan: Plan) -> Iterator[Plan]:
    """Plans of as many ranks, whose choices are those of `plan` or the plainest."""
    world = plan.num_devices
    sizes = [
        (tp, pp, cp, world // (tp * pp * cp))
        for tp in list_divisors(world)
        for pp in list_divisors(world // tp)
        for cp in sorted({1, plan.cp})
        if world // (tp * pp) % cp == 0
    ]
    stages = sorted({plan.zero_stage, min(plan.zero_stage, 1), 0}, reverse=True)
    choices = itertools.product(sizes, stages, list_divisors(plan.ep), {plan.sequence_parallel, False})
    for (tp, pp, cp, dp), zero_stage, ep, sequence_parallel in choices:
        changed: dict[str, Any] = {"tp": tp, "pp": pp, "dp": dp, "cp": cp, "etp": 1, "ep": ep, "zero_stage": zero_stage}
        changed |= {"sequence_parallel": sequence_parallel, "virtual_stages": 1, "schedule": "1f1b"}
        for kept in (dict[str, Any](), {"virtual_stages": plan.virtual_stages, "schedule": plan.schedule}):
            for shard_group in {plan.shard_group, 0}:
                if shard_group and dp % shard_group:
                    continue
                if (kept.get("schedule") == "interleaved" and pp == 1) or (ep > 1 and dp % ep):
                    continue
                yield replace(plan, **(changed | kept | {"shard_group": shard_group}))


def list_plans(parts: ModelParts, num_ranks: int) -> list[Plan]:
    """List the plans for `num_ranks` ranks that can run on such a model, each with another combination of axes.

    >>> [describe(plan) for plan in list_plans(ModelParts("Mine"), 2)]
    ['dp=2', 'dp=2 zero_stage=1', 'dp=2 zero_stage=2', 'dp=2 zero_stage=3']
    """
    found: dict[Plan, None] = {}
    divisors = list_divisors(num_ranks)
    for dp, cp, tp in itertools.product(reversed(divisors), divisors, divisors):
        if num_ranks % (dp * cp * tp):
            continue
        pp = num_ranks // (dp * cp * tp)
        for zero_stage, has_sequences, ep in itertools.product((0, 1, 2, 3), (False, True), list_divisors(dp)):
            if zero_stage and dp * cp == 1:
                continue
            plan = Plan(tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, zero_stage=zero_stage, sequence_parallel=has_sequences)
            found |= dict.fromkeys(
                candidate for candidate in _vary_schedule(plan) if explain_illegal(candidate, parts) is None
            )
    return list(found)


def _vary_schedule(plan: Plan) -> list[Plan]:
    if plan.pp == 1:
        return [plan]
    interleaved = replace(plan, schedule="interleaved", virtual_stages=2)
    return [plan, replace(plan, schedule="gpipe"), interleaved, replace(plan, schedule="zero_bubble")]


def _measure_distance(plan: Plan, other: Plan) -> float:
    """Count doublings and halvings of sizes, and the other settings that differ."""
    mine, theirs = plan.as_dict(), other.as_dict()
    sizes = ("tp", "pp", "dp", "ep", "cp", "etp")
    doublings = sum(abs(math.log2(getattr(plan, name) / getattr(other, name))) for name in sizes)
    return doublings + sum(mine[name] != theirs[name] for name in mine if name not in sizes)


def describe(plan: Plan) -> str:
    """Write the settings of a plan that are not the defaults.

    >>> describe(Plan(tp=2, dp=2, zero_stage=3))
    'tp=2 dp=2 zero_stage=3'
    """
    plain = Plan().as_dict()
    changed = {name: value for name, value in plan.as_dict().items() if value != plain[name]}
    return " ".join(f"{name}={value}" for name, value in changed.items()) or "tp=1 pp=1 dp=1"
