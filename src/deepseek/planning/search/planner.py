"""The search: which plan trains a model fastest on a cluster within limits, and why the others do not.

`plan` estimates every candidate of `space.py` (`estimates.py` says how), so its answer is exact over the space it was
given: no sampling, no annealing. Three rules keep it small and lose nothing: what does not divide is never listed; a
family whose weights, gradients and optimizer state alone exceed the device is dropped whole, since everything else only
adds; and GPipe is dropped beside 1F1B.

Out come the fastest plan, the front over (time, memory, energy), ten runners-up with what makes each worse, and how
many candidates each rule rejected (`results.py`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepseek.core.divisors import list_divisors
from deepseek.core.errors import ConfigError, InfeasibleError
from deepseek.distributed.plan import Plan
from deepseek.planning.estimate.step import predict
from deepseek.planning.feasibility import explain_misfit
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape, OperatorList
from deepseek.planning.search.estimates import (
    BUSY_ITEMS,
    WAITING_POWER,
    Estimates,
    Progress,
    apply_limits,
    detail_candidates,
    estimate_families,
    find_front,
    list_assumptions,
    rank,
)
from deepseek.planning.search.mixed_clusters import plan_mixed
from deepseek.planning.search.remedies import explain_memory
from deepseek.planning.search.request import USUAL_HEADROOM, Limits, Request, Space, choose_space
from deepseek.planning.search.results import NUM_RUNNERS_UP, EstimatedPlan, PlanningResult, compare
from deepseek.planning.search.space import KNOBS, build_columns, list_families
from deepseek.planning.search.throughput import measure_throughput

if TYPE_CHECKING:
    from torch import nn


def plan(
    model: ModelShape | OperatorList | nn.Module,
    cluster: Cluster,
    *,
    global_batch: int,
    limits: Limits | None = None,
    space: Space | None = None,
    on_progress: Progress | None = None,
) -> PlanningResult:
    """Find the fastest plan for `model` on `cluster` with `global_batch` sequences a step.

    `model` is a shape, a traced network, or a decoder that carries its configuration. Without `limits` a tenth of every
    device's memory stays free; without `space` everything is searched, in the 16 bit format and with the attention
    kernel that the devices have. `on_progress(done, total)` is told how many candidates are estimated. On a cluster of
    unequal devices the result's `placement` says which stage or replica gets how much. Raises `InfeasibleError` when
    nothing fits, with what would make it fit, or when limits contradict each other.

    >>> from deepseek.planning.models.model_shape import get_model_shape
    >>> found = plan(get_model_shape("Llama3-8B"), Cluster.of("H100-SXM-80GB"), global_batch=16)
    >>> found.best.plan.num_devices, len(found.runners_up)
    (8, 10)
    """
    if not isinstance(model, ModelShape | OperatorList):
        from deepseek.planning.models.from_module import read_module

        model = read_module(model)
    limits, space = limits or Limits(USUAL_HEADROOM), space or choose_space(cluster)
    if isinstance(model, OperatorList):
        return _plan_operators(Request(model, cluster, global_batch, limits, space))
    return plan_request(Request(model, cluster, global_batch, limits, space), on_progress)


def plan_request(request: Request[ModelShape], on_progress: Progress | None = None) -> PlanningResult:
    """Answer one request for a decoder, as `plan` does."""
    result = _plan_uniform(request, on_progress) if request.cluster.is_uniform else plan_mixed(request)
    model, cluster, batch = request.model, request.cluster, request.global_batch
    throughput = measure_throughput(model, cluster, batch, request.space.precision, result.best.step_time_s)
    return replace(result, throughput=throughput)


def _plan_uniform(request: Request[ModelShape], on_progress: Progress | None) -> PlanningResult:
    families, layouts, rejected = list_families(request)
    if not families:
        raise ConfigError(_explain_no_layout(layouts, request))
    fitting = estimate_families(families, request, rejected, on_progress)
    if not len(fitting.rows):
        raise InfeasibleError(explain_memory(request))
    kept = apply_limits(fitting, request.limits, rejected)

    def detail(indices: NDArray[np.intp]) -> list[EstimatedPlan]:
        chosen = kept.take(indices)
        return detail_candidates(chosen, build_columns(chosen.rows, request), request.space)

    best, *others = detail(rank(kept)[: NUM_RUNNERS_UP + 1])
    return PlanningResult(
        best=best,
        front=tuple(detail(find_front(kept))),
        runners_up=tuple(compare(best, other) for other in others),
        num_candidates=sum(family.num_candidates for family in families),
        num_fitting=len(fitting.rows),
        rejected_layouts=dict(+layouts),
        rejected_candidates=dict(+rejected),
        assumptions=list_assumptions(request.cluster, request.space),
        software=request.space.software,
    )


def _explain_no_layout(layouts: Counter[str], request: Request[ModelShape]) -> str:
    rules = ", ".join(f"{rule} ({count})" for rule, count in layouts.most_common(3))
    devices, batch = request.cluster.num_devices, request.global_batch
    divisors = [divisor for divisor in list_divisors(devices) if batch % divisor == 0]
    return (
        f"no way of assigning {devices} devices suits {request.model.name or 'the model'} and "
        f"global_batch={batch}: {rules}; "
        f"choose a batch or a number of devices with common divisors (now {', '.join(map(str, divisors))})"
    )


def _plan_operators(request: Request[OperatorList]) -> PlanningResult:
    """Plan a traced network: ZeRO 0 to 2 and the micro-batch can be chosen, few enough to estimate one by one."""
    budget, space, devices = request.memory_budget_bytes, request.space, request.cluster.num_devices
    if request.global_batch % devices:
        raise ConfigError(
            f"global_batch={request.global_batch} cannot be shared by {devices} devices; choose a multiple of {devices}"
        )
    found = [
        _estimate_operators(
            Plan(dp=devices, zero_stage=stage, micro_batch_size=size, precision=space.precision), request
        )
        for size in list_divisors(request.global_batch // devices)
        for stage in space.zero_stages
        if (stage == 0 or (stage < 3 and devices > 1)) and space.allows("micro_batch_sizes", size)
    ]
    fitting = [candidate for candidate in found if candidate.memory_bytes <= budget]
    rejected = Counter({"memory: with activations and buffers": len(found) - len(fitting)})
    if not fitting:
        least = min((candidate.memory_bytes for candidate in found), default=0.0)
        raise InfeasibleError(
            f"{request.model.name} needs {least / 1e9:.3g} GB on each device and {budget / 1e9:.3g} GB may be used; "
            "take devices with more memory, or a smaller sample"
        )
    rows = np.zeros((len(fitting), len(KNOBS)), np.int32)
    rows[:, 0] = range(len(fitting))  # which of them a row is; these plans differ in no knob of the search
    estimates = Estimates(
        rows,
        np.array([candidate.step_time_s for candidate in fitting]),
        np.array([candidate.memory_bytes for candidate in fitting]),
        np.array([np.nan if candidate.energy_j is None else candidate.energy_j for candidate in fitting]),
    )
    kept = apply_limits(estimates, request.limits, rejected)
    best, *others = [fitting[kept.rows[index, 0]] for index in rank(kept)]
    return PlanningResult(
        best=best,
        front=tuple(fitting[kept.rows[index, 0]] for index in find_front(kept)),
        runners_up=tuple(compare(best, other) for other in others[:NUM_RUNNERS_UP]),
        num_candidates=len(found),
        num_fitting=len(fitting),
        rejected_layouts={},
        rejected_candidates=dict(+rejected),
        assumptions=list_assumptions(request.cluster, space),
        software=space.software,
    )


def _estimate_operators(plan: Plan, request: Request[OperatorList]) -> EstimatedPlan:
    model, cluster, batch = request.model, request.cluster, request.global_batch
    assert explain_misfit(plan, model, cluster, batch) is None
    predicted = predict(model, cluster, plan, batch, software=request.space.software)
    power = sum(device.power_w for device in cluster.accelerators)
    busy = sum(predicted.time_items_s.get(name, 0.0) for name in BUSY_ITEMS)
    joules = power * (busy + WAITING_POWER * (predicted.step_time_s - busy)) if power else None
    return EstimatedPlan(
        plan,
        predicted.step_time_s,
        predicted.memory_bytes,
        joules,
        predicted.time_items_s,
        predicted.memory_items_bytes,
    )
