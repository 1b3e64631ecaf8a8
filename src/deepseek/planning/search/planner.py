"""The search: which plan trains a model fastest on a cluster within limits, and why the others do not.

`plan` prices every candidate of `candidates.py` with the same formulas as `predict` (columns of 50,000 rows, some
microseconds each on one core), so its answer is exact over the space it was given: no sampling, no annealing. Three
rules keep it small and lose nothing: what does not divide is never made; a family whose weights, gradients and
optimizer state alone exceed the device is dropped whole, since everything else only adds; and GPipe is dropped beside
1F1B. Candidates that do not fit are not timed.

Out come the fastest plan, the front over (time, memory, energy), ten runners-up with what makes each worse, and
how many candidates each rule rejected. Energy rests on one assumption, which the result repeats: a device draws its
power limit while it computes and `WAITING_POWER` of it while it waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan
from deepseek.planning.estimate.columns import Array, Columns
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.estimate.step import predict, predict_times
from deepseek.planning.feasibility import explain_misfit
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.software import Software
from deepseek.planning.models.model_shape import ModelShape, OperatorList
from deepseek.planning.search.balancing import Placement
from deepseek.planning.search.space import (
    KNOBS,
    Family,
    Space,
    Table,
    expand,
    list_divisors,
    list_families,
    list_shardings,
    make_columns,
    make_plan,
)

Progress = Callable[[int, int], None]

NUM_RUNNERS_UP = 10
WAITING_POWER = 0.4  # of the power limit: clocks stay up and memory refreshes while a device waits for messages
BUSY_ITEMS = ("matmul", "attention", "memory_bound", "recomputation", "head", "optimizer")
STATE_ITEMS = ("weights", "gradients", "optimizer", "context")


@dataclass(frozen=True)
class Limits:
    """What a plan may take: `memory_headroom` is the share of a device's memory that has to stay free.

    >>> Limits(memory_headroom=0.1).memory_headroom
    0.1
    """

    memory_headroom: float = 0.0
    max_step_time_s: float | None = None
    max_energy_j: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that no plan can meet."""
        if not 0.0 <= self.memory_headroom < 1.0:
            raise ConfigError(f"memory_headroom={self.memory_headroom!r} is not a share of memory; give 0 to below 1")
        for name in ("max_step_time_s", "max_energy_j"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"{name}={value!r} leaves no room for any step; give a number above 0, or leave it out"
                )


@dataclass(frozen=True)
class Candidate:
    """A plan with its price: seconds and joules of one step, bytes of the fullest rank, both by item where it helps."""

    plan: Plan
    step_time_s: float
    memory_bytes: float
    energy_j: float | None
    time_items_s: dict[str, float] = field(repr=False)
    memory_items_bytes: dict[str, float] = field(repr=False)


@dataclass(frozen=True)
class RunnerUp:
    """A plan that is not the best one, and the item in which it loses most."""

    candidate: Candidate
    item: str
    difference: float
    reason: str


@dataclass(frozen=True)
class PlanningResult:
    """What the search found. `rejected_layouts` counts ways of assigning devices, `rejected_candidates` whole plans.

    `software` are the traits of the program that the plans were estimated for.
    """

    best: Candidate
    front: tuple[Candidate, ...]
    runners_up: tuple[RunnerUp, ...]
    num_candidates: int
    num_fitting: int
    rejected_layouts: dict[str, int]
    rejected_candidates: dict[str, int]
    assumptions: tuple[str, ...]
    software: Software
    placement: Placement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries and lists, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Prices:
    """All candidates that fit: their rows, seconds, bytes, and joules (`nan` without power figures)."""

    rows: Table
    seconds: Array
    num_bytes: Array
    joules: Array

    def take(self, chosen: NDArray[Any]) -> Prices:
        """Some of them."""
        return Prices(self.rows[chosen], self.seconds[chosen], self.num_bytes[chosen], self.joules[chosen])


def plan(
    model: ModelShape | OperatorList,
    cluster: Cluster,
    *,
    global_batch: int,
    limits: Limits | None = None,
    space: Space | None = None,
    on_progress: Progress | None = None,
) -> PlanningResult:
    """Find the fastest plan for `model` on `cluster` with `global_batch` sequences a step.

    `space` narrows the choices, `on_progress(done, total)` is told how many candidates are priced. On a cluster of
    unequal devices the result's `placement` says which stage or replica gets how much. Raises `ConfigError` when
    nothing fits, with what would make it fit, or when limits contradict each other.

    >>> from deepseek.planning.models.model_shape import get_model_shape
    >>> found = plan(get_model_shape("Llama3-8B"), Cluster.of("H100-SXM-80GB"), global_batch=16)
    >>> found.best.plan.num_devices, len(found.runners_up)
    (8, 10)
    """
    limits, space = limits or Limits(), space or Space()
    check_request(cluster, global_batch, limits)
    if isinstance(model, OperatorList):
        return _plan_operators(model, cluster, global_batch, limits, space)
    if not cluster.is_uniform:
        from deepseek.planning.search.mixed_clusters import plan_mixed

        return plan_mixed(model, cluster, global_batch, limits, space)
    families, layouts, rejected = list_families(model, cluster, global_batch, space)
    if not families:
        raise ConfigError(_explain_no_layout(layouts, model, cluster, global_batch))
    budget = memory_budget(cluster, limits)
    prices = price_families(families, model, cluster, global_batch, space, budget, rejected, on_progress)
    if not len(prices.rows):
        from deepseek.planning.search.remedies import explain_memory

        raise ConfigError(explain_memory(model, cluster, global_batch, limits, space))
    kept = apply_limits(prices, limits, rejected)
    return _report(kept, model, cluster, global_batch, space, layouts, rejected, families, len(prices.rows))


def check_request(cluster: Cluster, global_batch: int, limits: Limits) -> None:
    """Refuse what cannot be priced: no batch, no links, no power figures for an energy limit."""
    if not isinstance(global_batch, int) or isinstance(global_batch, bool) or global_batch < 1:
        raise ConfigError(f"global_batch={global_batch!r} is not a positive number of sequences; give at least 1")
    if len(cluster.nodes) > 1 and cluster.network is None:
        raise ConfigError(
            f"{len(cluster.nodes)} nodes have no network between them; give the cluster a LinkClass with alpha_s and "
            "bandwidth_bytes_per_s, or plan for one node"
        )
    unknown = sorted({each.name for each in cluster.accelerators if not each.power_w})
    if limits.max_energy_j is not None and unknown:
        raise ConfigError(
            f"max_energy_j needs power figures, and {unknown[0]} has none; set its power_w or drop the limit"
        )


def memory_budget(cluster: Cluster, limits: Limits) -> float:
    """Bytes that a plan may take on the smallest device."""
    return min(node.accelerator.memory_bytes for node in cluster.nodes) * (1.0 - limits.memory_headroom)


def price_families(
    families: Sequence[Family],
    model: ModelShape,
    cluster: Cluster,
    global_batch: int,
    space: Space,
    budget: float,
    rejected: Counter[str],
    on_progress: Progress | None = None,
) -> Prices:
    """Prices of all candidates that fit into `budget` bytes, in the order of the families."""
    shardings = list_shardings(families)
    state = sum_items(measure_memory(make_columns(shardings, model, cluster, global_batch, space)), STATE_ITEMS)
    is_kept = np.broadcast_to(state <= budget, len(shardings))
    sizes = np.array([len(family.passing) for family in families for _ in family.sharding])
    rejected["memory: weights, gradients and optimizer alone"] += int(np.sum(sizes[~is_kept]))
    total, done = int(np.sum(sizes)), int(np.sum(sizes[~is_kept]))
    parts = []
    for rows in expand(families, is_kept):
        part = _price_rows(rows, model, cluster, global_batch, space, budget)
        rejected["memory: with activations and buffers"] += len(rows) - len(part.rows)
        parts.append(part)
        done += len(rows)
        if on_progress is not None:
            on_progress(done, total)
    return join_prices(parts)


def sum_items(items: dict[str, Array], names: Iterable[str] | None = None) -> Array:
    """The sum of some items, or of all."""
    chosen = items.values() if names is None else [items[name] for name in names if name in items]
    return np.asarray(np.sum(np.broadcast_arrays(*chosen), axis=0))


def _price_rows(
    rows: Table, model: ModelShape, cluster: Cluster, global_batch: int, space: Space, budget: float
) -> Prices:
    columns = make_columns(rows, model, cluster, global_batch, space)
    needed = sum_items(measure_memory(columns))
    is_fitting = np.broadcast_to(needed <= budget, len(rows))
    if not is_fitting.any():
        return join_prices([])
    times = predict_times(columns.take(is_fitting))
    seconds = sum_items(times)
    power = sum(each.power_w for each in cluster.accelerators)
    return Prices(rows[is_fitting], seconds, needed[is_fitting], price_energy(times, seconds, power))


def price_energy(times: dict[str, Array], seconds: Array, power_w: float) -> Array:
    """Joules of one step of devices that together may draw `power_w`; `nan` where that is not known."""
    busy = sum_items(times, BUSY_ITEMS)
    return np.asarray(power_w * (busy + WAITING_POWER * (seconds - busy)) if power_w else np.full_like(seconds, np.nan))


def join_prices(parts: Sequence[Prices]) -> Prices:
    """One table of several."""
    if not parts:
        return Prices(np.empty((0, len(KNOBS)), np.int32), np.empty(0), np.empty(0), np.empty(0))
    return Prices(*(np.concatenate([getattr(part, name) for part in parts]) for name in Prices.__dataclass_fields__))


def apply_limits(prices: Prices, limits: Limits, rejected: Counter[str]) -> Prices:
    """The candidates within the limits on time and energy; `ConfigError` when there is none."""
    is_slow = prices.seconds > (np.inf if limits.max_step_time_s is None else limits.max_step_time_s)
    is_hungry = np.zeros(len(is_slow), np.bool_) if limits.max_energy_j is None else prices.joules > limits.max_energy_j
    if (is_slow | is_hungry).all():
        raise ConfigError(_explain_limits(prices, limits, is_slow, is_hungry))
    rejected["slower than max_step_time_s"] += int(is_slow.sum())
    rejected["more energy than max_energy_j"] += int((is_hungry & ~is_slow).sum())
    return prices.take(~(is_slow | is_hungry))


def _explain_limits(prices: Prices, limits: Limits, is_slow: NDArray[np.bool_], is_hungry: NDArray[np.bool_]) -> str:
    if is_slow.all():
        fastest = float(prices.seconds.min())
        return (
            f"no plan that fits takes at most {limits.max_step_time_s:g} s a step; the fastest "
            f"takes {fastest:.4g} s, allow that"
        )
    if is_hungry.all():
        least = float(prices.joules.min())
        return (
            f"no plan that fits takes at most {limits.max_energy_j:g} J a step; the thriftiest "
            f"takes {least:.4g} J, allow that"
        )
    quickest = float(prices.seconds[~is_hungry].min())
    return (
        f"max_step_time_s={limits.max_step_time_s:g} and max_energy_j={limits.max_energy_j:g} can each be met, but not "
        f"together; within the energy the fastest plan takes {quickest:.4g} s, so raise one of them"
    )


def find_front(prices: Prices) -> NDArray[np.intp]:
    """Places of the candidates that no other beats in seconds, bytes and joules at once, fastest first."""
    joules = np.nan_to_num(prices.joules)
    alive = np.lexsort((joules, prices.num_bytes, prices.seconds))
    front = []
    while len(alive):
        first = alive[0]
        front.append(first)
        is_worse = (prices.num_bytes[alive] >= prices.num_bytes[first]) & (joules[alive] >= joules[first])
        alive = alive[~is_worse]
    return np.array(front, np.intp)


def order_prices(prices: Prices) -> NDArray[np.intp]:
    """Places from best to worst: faster first, then smaller, then the plan with the smaller numbers."""
    return np.lexsort((prices.rows.sum(axis=1), prices.num_bytes, prices.seconds))


def _report(
    prices: Prices,
    model: ModelShape,
    cluster: Cluster,
    global_batch: int,
    space: Space,
    layouts: Counter[str],
    rejected: Counter[str],
    families: Sequence[Family],
    num_fitting: int,
) -> PlanningResult:
    def detail(places: NDArray[np.intp]) -> list[Candidate]:
        chosen = prices.take(places)
        return detail_candidates(chosen, make_columns(chosen.rows, model, cluster, global_batch, space), space)

    best, *others = detail(order_prices(prices)[: NUM_RUNNERS_UP + 1])
    return PlanningResult(
        best=best,
        front=tuple(detail(find_front(prices))),
        runners_up=tuple(compare(best, other) for other in others),
        num_candidates=sum(family.num_candidates for family in families),
        num_fitting=num_fitting,
        rejected_layouts=dict(+layouts),
        rejected_candidates=dict(+rejected),
        assumptions=list_assumptions(cluster, space),
        software=space.software,
    )


def detail_candidates(prices: Prices, columns: Columns, space: Space) -> list[Candidate]:
    """The priced rows as candidates with all their items."""
    times, memory = predict_times(columns), measure_memory(columns)
    return [
        Candidate(
            plan=make_plan(row, space),
            step_time_s=float(prices.seconds[place]),
            memory_bytes=float(prices.num_bytes[place]),
            energy_j=None if np.isnan(prices.joules[place]) else float(prices.joules[place]),
            time_items_s=_pick(times, place),
            memory_items_bytes=_pick(memory, place),
        )
        for place, row in enumerate(prices.rows)
    ]


def _pick(items: dict[str, Array], place: int) -> dict[str, float]:
    return {name: float(value[place] if len(value) > 1 else value[0]) for name, value in items.items()}


def compare(best: Candidate, other: Candidate) -> RunnerUp:
    """Why `other` is not the best: the item of time, or else of memory, in which it loses most."""
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


def list_assumptions(cluster: Cluster, space: Space) -> tuple[str, ...]:
    """What the numbers of a result rest on, in sentences."""
    names = sorted({each.name for each in cluster.accelerators})
    powered = all(each.power_w for each in cluster.accelerators)
    energy = (
        f"energy: a device draws its power limit while it computes and {WAITING_POWER:.0%} of it while it waits"
        if powered
        else "energy: not priced, since the accelerators have no power figures"
    )
    return (
        f"accelerators: {', '.join(names)}; network {cluster.network.bandwidth_bytes_per_s * 8e-9:g} Gbit/s a device",
        f"precision: {space.precision}; optimizer: Adam with 32 bit state",
        f"attention: {space.software.attention}; gradients in {4 if space.software.has_fp32_gradients else 2} bytes",
        "stages may differ by a layer where the depth does not divide; interleaved stages may not",
        energy,
    )


def _explain_no_layout(layouts: Counter[str], model: ModelShape, cluster: Cluster, global_batch: int) -> str:
    rules = ", ".join(f"{rule} ({count})" for rule, count in layouts.most_common(3))
    divisors = [each for each in list_divisors(cluster.num_devices) if global_batch % each == 0]
    return (
        f"no way of dealing {cluster.num_devices} devices suits {model.name or 'the model'} and "
        f"global_batch={global_batch}: {rules}; "
        f"choose a batch or a number of devices with common divisors (now {', '.join(map(str, divisors))})"
    )


def _plan_operators(
    model: OperatorList, cluster: Cluster, global_batch: int, limits: Limits, space: Space
) -> PlanningResult:
    """Traced networks have ZeRO 0 to 2 and the micro-batch to choose from, few enough to price singly."""
    budget, rejected, found = memory_budget(cluster, limits), Counter[str](), []
    layouts = Counter[str]()
    devices = cluster.num_devices
    if global_batch % devices:
        raise ConfigError(
            f"global_batch={global_batch} cannot be shared by {devices} devices; choose a multiple of {devices}"
        )
    for size in list_divisors(global_batch // devices):
        for stage in (stage for stage in space.zero_stages if stage == 0 or (stage < 3 and devices > 1)):
            if not space.allows("micro_batch_sizes", size):
                continue
            each = Plan(dp=devices, zero_stage=stage, micro_batch_size=size, precision=space.precision)
            assert explain_misfit(each, model, cluster, global_batch) is None
            found.append(_price_operators(model, cluster, each, global_batch, space.software))
    fitting = [each for each in found if each.memory_bytes <= budget]
    rejected["memory: with activations and buffers"] = len(found) - len(fitting)
    if not fitting:
        least = min(each.memory_bytes for each in found) if found else 0.0
        raise ConfigError(
            f"{model.name} needs {least / 1e9:.3g} GB on each device and {budget / 1e9:.3g} GB may be used; "
            "take devices with more memory, or a smaller sample"
        )
    rows = np.zeros((len(fitting), len(KNOBS)), np.int32)
    rows[:, 0] = range(len(fitting))
    prices = Prices(
        rows,
        np.array([each.step_time_s for each in fitting]),
        np.array([each.memory_bytes for each in fitting]),
        np.array([np.nan if each.energy_j is None else each.energy_j for each in fitting]),
    )
    kept = apply_limits(prices, limits, rejected)
    order = [fitting[kept.rows[place, 0]] for place in order_prices(kept)]
    return PlanningResult(
        best=order[0],
        front=tuple(fitting[kept.rows[place, 0]] for place in find_front(kept)),
        runners_up=tuple(compare(order[0], other) for other in order[1 : NUM_RUNNERS_UP + 1]),
        num_candidates=len(found),
        num_fitting=len(fitting),
        rejected_layouts=dict(+layouts),
        rejected_candidates=dict(+rejected),
        assumptions=list_assumptions(cluster, space),
        software=space.software,
    )


def _price_operators(
    model: OperatorList, cluster: Cluster, each: Plan, global_batch: int, software: Software
) -> Candidate:
    predicted = predict(model, cluster, each, global_batch, software=software)
    power = sum(device.power_w for device in cluster.accelerators)
    busy = sum(predicted.time_items_s.get(name, 0.0) for name in BUSY_ITEMS)
    joules = power * (busy + WAITING_POWER * (predicted.step_time_s - busy)) if power else None
    return Candidate(
        each,
        predicted.step_time_s,
        predicted.memory_bytes,
        joules,
        predicted.time_items_s,
        predicted.memory_items_bytes,
    )
