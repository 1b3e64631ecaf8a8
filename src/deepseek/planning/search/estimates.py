"""Estimates of many candidates at once, and what is made of them: limits, the front, the order from best to worst.

The search estimates tables of 50,000 candidates with the same formulas as `predict` (`planning/estimate/columns.py`),
some microseconds each on one core. Candidates that do not fit are not timed. Energy rests on one assumption, which
every result repeats: a device draws its power limit while it computes and `WAITING_POWER` of it while it waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek.core.errors import InfeasibleError
from deepseek.planning.estimate.columns import Array, Columns
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.estimate.step import predict_times
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.search.request import Limits, Request, Space
from deepseek.planning.search.results import EstimatedPlan
from deepseek.planning.search.space import KNOBS, PlanFamily, Table, build_columns, build_plan, expand, list_shardings

Progress = Callable[[int, int], None]

WAITING_POWER = 0.4  # of the power limit: clocks stay up and memory refreshes while a device waits for messages
BUSY_ITEMS = ("matmul", "attention", "memory_bound", "recomputation", "head", "optimizer")
STATE_ITEMS = ("weights", "gradients", "optimizer", "context")


@dataclass(frozen=True)
class Estimates:
    """All candidates that fit: their rows, seconds, bytes, and joules (`nan` without power figures)."""

    rows: Table
    seconds: Array
    num_bytes: Array
    joules: Array

    def take(self, chosen: NDArray[Any]) -> Estimates:
        """Return some of them."""
        return Estimates(self.rows[chosen], self.seconds[chosen], self.num_bytes[chosen], self.joules[chosen])


def estimate_families(
    families: Sequence[PlanFamily],
    request: Request[ModelShape],
    rejected: Counter[str],
    on_progress: Progress | None = None,
) -> Estimates:
    """Estimate all candidates that fit into the memory budget, in the order of the families.

    What does not fit is counted in `rejected`.
    """
    budget = request.memory_budget_bytes
    shardings = list_shardings(families)
    state = sum_items(measure_memory(build_columns(shardings, request)), STATE_ITEMS)
    is_kept = np.broadcast_to(state <= budget, len(shardings))
    sizes = np.array([len(family.passing) for family in families for _ in family.sharding])
    rejected["memory: weights, gradients and optimizer alone"] += int(np.sum(sizes[~is_kept]))
    total, done = int(np.sum(sizes)), int(np.sum(sizes[~is_kept]))
    parts = []
    for rows in expand(families, is_kept):
        part = _estimate_rows(rows, request, budget)
        rejected["memory: with activations and buffers"] += len(rows) - len(part.rows)
        parts.append(part)
        done += len(rows)
        if on_progress is not None:
            on_progress(done, total)
    return join_estimates(parts)


def sum_items(items: dict[str, Array], names: Iterable[str] | None = None) -> Array:
    """Add up some items, or all."""
    chosen = items.values() if names is None else [items[name] for name in names if name in items]
    return np.asarray(np.sum(np.broadcast_arrays(*chosen), axis=0))


def _estimate_rows(rows: Table, request: Request[ModelShape], budget: float) -> Estimates:
    columns = build_columns(rows, request)
    needed = sum_items(measure_memory(columns))
    is_fitting = np.broadcast_to(needed <= budget, len(rows))
    if not is_fitting.any():
        return join_estimates([])
    times = predict_times(columns.take(is_fitting))
    seconds = sum_items(times)
    power = sum(device.power_w for device in request.cluster.accelerators)
    return Estimates(rows[is_fitting], seconds, needed[is_fitting], estimate_energy(times, seconds, power))


def estimate_energy(times: dict[str, Array], seconds: Array, power_w: float) -> Array:
    """Return joules of one step of devices that together may draw `power_w`; `nan` where that is not known."""
    busy = sum_items(times, BUSY_ITEMS)
    return np.asarray(power_w * (busy + WAITING_POWER * (seconds - busy)) if power_w else np.full_like(seconds, np.nan))


def join_estimates(parts: Sequence[Estimates]) -> Estimates:
    """Join several tables into one."""
    if not parts:
        return Estimates(np.empty((0, len(KNOBS)), np.int32), np.empty(0), np.empty(0), np.empty(0))
    names = Estimates.__dataclass_fields__
    return Estimates(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def apply_limits(estimates: Estimates, limits: Limits, rejected: Counter[str]) -> Estimates:
    """Keep the candidates within the limits on time and energy; `InfeasibleError` when there is none."""
    is_slow = estimates.seconds > (np.inf if limits.max_step_time_s is None else limits.max_step_time_s)
    is_hungry = (
        np.zeros(len(is_slow), np.bool_) if limits.max_energy_j is None else estimates.joules > limits.max_energy_j
    )
    if (is_slow | is_hungry).all():
        raise InfeasibleError(_explain_limits(estimates, limits, is_slow, is_hungry))
    rejected["slower than max_step_time_s"] += int(is_slow.sum())
    rejected["more energy than max_energy_j"] += int((is_hungry & ~is_slow).sum())
    return estimates.take(~(is_slow | is_hungry))


def _explain_limits(
    estimates: Estimates, limits: Limits, is_slow: NDArray[np.bool_], is_hungry: NDArray[np.bool_]
) -> str:
    if is_slow.all():
        fastest = float(estimates.seconds.min())
        return (
            f"no plan that fits takes at most {limits.max_step_time_s:g} s a step; the fastest "
            f"takes {fastest:.4g} s, allow that"
        )
    if is_hungry.all():
        least = float(estimates.joules.min())
        return (
            f"no plan that fits takes at most {limits.max_energy_j:g} J a step; the thriftiest "
            f"takes {least:.4g} J, allow that"
        )
    quickest = float(estimates.seconds[~is_hungry].min())
    return (
        f"max_step_time_s={limits.max_step_time_s:g} and max_energy_j={limits.max_energy_j:g} can each be met, but not "
        f"together; within the energy the fastest plan takes {quickest:.4g} s, so raise one of them"
    )


def find_front(estimates: Estimates) -> NDArray[np.intp]:
    """Return indices of the candidates that no other beats in seconds, bytes and joules at once, fastest first."""
    joules = np.nan_to_num(estimates.joules)
    alive = np.lexsort((joules, estimates.num_bytes, estimates.seconds))
    front = []
    while len(alive):
        first = alive[0]
        front.append(first)
        is_worse = (estimates.num_bytes[alive] >= estimates.num_bytes[first]) & (joules[alive] >= joules[first])
        alive = alive[~is_worse]
    return np.array(front, np.intp)


def rank(estimates: Estimates) -> NDArray[np.intp]:
    """Return indices from best to worst: faster first, then smaller, then the plan with the smaller numbers."""
    return np.lexsort((estimates.rows.sum(axis=1), estimates.num_bytes, estimates.seconds))


def detail_candidates(estimates: Estimates, columns: Columns, space: Space) -> list[EstimatedPlan]:
    """Build candidates with all their items out of rows whose `columns` are given."""
    times, memory = predict_times(columns), measure_memory(columns)
    return [
        EstimatedPlan(
            plan=build_plan(row, space),
            step_time_s=float(estimates.seconds[index]),
            memory_bytes=float(estimates.num_bytes[index]),
            energy_j=None if np.isnan(estimates.joules[index]) else float(estimates.joules[index]),
            time_items_s=_pick(times, index),
            memory_items_bytes=_pick(memory, index),
        )
        for index, row in enumerate(estimates.rows)
    ]


def _pick(items: dict[str, Array], index: int) -> dict[str, float]:
    return {name: float(value[index] if len(value) > 1 else value[0]) for name, value in items.items()}


def list_assumptions(cluster: Cluster, space: Space) -> tuple[str, ...]:
    """List what the numbers of a result rest on, in sentences."""
    names = sorted({device.name for device in cluster.accelerators})
    is_powered = all(device.power_w for device in cluster.accelerators)
    energy = (
        f"energy: a device draws its power limit while it computes and {WAITING_POWER:.0%} of it while it waits"
        if is_powered
        else "energy: not estimated, since the accelerators have no power figures"
    )
    lacking = sorted({device.name for device in cluster.accelerators if space.precision not in device.peak_flops})
    slower = f", computed at the 16 bit rate of {lacking[0]}, which has no {space.precision} units" if lacking else ""
    return (
        f"accelerators: {', '.join(names)}; network {cluster.network.bandwidth_bytes_per_s * 8e-9:g} Gbit/s a device",
        f"precision: {space.precision}{slower}; optimizer: Adam with 32 bit state",
        f"attention: {space.software.attention}; gradients in {4 if space.software.has_fp32_gradients else 2} bytes",
        "stages may differ by a layer where the depth does not divide; interleaved stages may not",
        energy,
    )
