"""The results of a search: the best plan, what comes near it and why it is worse, and what was rejected."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deepseek.distributed.plan import Plan
from deepseek.planning.machines.software import Software
from deepseek.planning.search.balancing import DeviceShares
from deepseek.planning.search.throughput import Throughput

NUM_RUNNERS_UP = 10


@dataclass(frozen=True)
class EstimatedPlan:
    """A plan with its estimate: seconds and joules of a step, bytes of the fullest rank, with their items."""

    plan: Plan
    step_time_s: float
    memory_bytes: float
    energy_j: float | None
    time_items_s: dict[str, float] = field(repr=False)
    memory_items_bytes: dict[str, float] = field(repr=False)


@dataclass(frozen=True)
class RunnerUp:
    """A plan that is not the best one, and the item in which it loses most."""

    candidate: EstimatedPlan
    item: str
    difference: float
    reason: str


@dataclass(frozen=True)
class PlanningResult:
    """The best plan that the search found, and the plans that come near it.

    `rejected_layouts` counts ways of assigning devices, `rejected_candidates` whole plans. `software` holds the traits
    of the program that the plans were estimated for. A traced network has no tokens, and so no `throughput`.
    """

    best: EstimatedPlan
    front: tuple[EstimatedPlan, ...]
    runners_up: tuple[RunnerUp, ...]
    num_candidates: int
    num_fitting: int
    rejected_layouts: dict[str, int]
    rejected_candidates: dict[str, int]
    assumptions: tuple[str, ...]
    software: Software
    placement: DeviceShares | None = None
    throughput: Throughput | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries and lists, ready for JSON."""
        return asdict(self)


def compare(best: EstimatedPlan, other: EstimatedPlan) -> RunnerUp:
    """Say why `other` is not the best: the item of time, or else of memory, in which it loses most."""
    slower = other.step_time_s - best.step_time_s
    if slower > 1e-9 * best.step_time_s:
        item, difference = _find_worst(best.time_items_s, other.time_items_s)
        reason = f"{item} takes {1e3 * difference:.4g} ms more, and the step {1e3 * slower:.4g} ms more"
    elif other.memory_bytes > best.memory_bytes:
        item, difference = _find_worst(best.memory_items_bytes, other.memory_items_bytes)
        reason = f"as fast, but {item} takes {difference / 1e9:.4g} GB more"
    else:
        item, difference, reason = "none", 0.0, "as fast and as small; the best plan switches less on"
    return RunnerUp(other, item, difference, reason)


def _find_worst(best: dict[str, float], other: dict[str, float]) -> tuple[str, float]:
    differences = {name: value - best.get(name, 0.0) for name, value in other.items()}
    item = max(differences, key=lambda name: differences[name])
    return item, differences[item]


def describe_plan_shortly(plan: Plan) -> str:
    """Write the numbers of a plan in one short line.

    >>> describe_plan_shortly(Plan(tp=8, pp=4))
    'tp8 pp4 dp1 zero0 mbs1 1f1b'
    """
    optional = "".join(f" {name}{value}" for name, value in (("cp", plan.cp), ("ep", plan.ep)) if value > 1)
    schedule = plan.schedule + (f"x{plan.virtual_stages}" if plan.virtual_stages > 1 else "")
    again = f" {plan.recomputation}" if plan.recomputation != "none" else ""
    return (
        f"tp{plan.tp} pp{plan.pp} dp{plan.dp}{optional} zero{plan.zero_stage} "
        f"mbs{plan.micro_batch_size} {schedule}{again}"
    )
