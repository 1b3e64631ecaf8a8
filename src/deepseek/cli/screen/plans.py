"""Plans on a screen: what `deepseek plan` and its subcommands found, as tables or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deepseek.cli.screen.tables import show_table
from deepseek.core.units import format_bytes, format_count, format_seconds
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.measured_collectives import MeasuredCollective
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.scaling import ScalingCurve
from deepseek.planning.search.estimates import Progress
from deepseek.planning.search.planner import plan_request
from deepseek.planning.search.request import Request
from deepseek.planning.search.results import EstimatedPlan, PlanningResult, describe_plan_shortly
from deepseek.planning.search.throughput import Budget

if TYPE_CHECKING:
    from deepseek.bench.plan_ranking import PlanRanking
    from deepseek.bench.plan_trial import Checked

_FRONT_SHOWN = 8


def search(request: Request[ModelShape]) -> PlanningResult:
    """Answer a request, with a bar on standard error while that takes long."""
    with _progress() as report:
        return plan_request(request, report)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar on standard error while a long search goes on; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("plans", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")


def show_result(request: Request[ModelShape], result: PlanningResult, top: int, budget: Budget | None = None) -> None:
    """Show everything that a search found, as tables; `budget` is what some number of tokens takes at least."""
    best = result.best
    model = request.model
    named = ("model", f"{model.name or 'without a name'}, {format_count(model.num_parameters)} parameters")
    described = [named, *_describe_plan(best), *_describe_throughput(request, result)]
    show_table("The fastest plan", ("", ""), described + (_describe_budget(budget) if budget else []))
    if result.placement is not None:
        kind = "stage" if result.placement.is_by_stage else "replica"
        rows = [
            (str(index), share.accelerator, str(share.num_devices), str(share.layers), str(share.micro_batches))
            for index, share in enumerate(result.placement.shares)
        ]
        show_table(f"What each {kind} gets", (kind, "device", "devices", "layers", "micro-batches"), rows)
    show_table("Time of one step", ("item", "ms", "share"), _list_items(best.time_items_s, 1e3))
    show_table("Memory of the fullest device", ("item", "GB", "share"), _list_items(best.memory_items_bytes, 1e-9))
    runners = [(*_summarize(runner_up.candidate), runner_up.reason) for runner_up in result.runners_up[:top]]
    if runners:
        show_table("Runners-up", ("plan", "step", "memory", "energy", "why it is worse"), runners)
    front = [_summarize(candidate) for candidate in result.front[:_FRONT_SHOWN]]
    title = f"No other plan beats these in time, memory and energy at once ({len(result.front)} in all)"
    show_table(title, ("plan", "step", "memory", "energy"), front)
    _show_rejected(result)
    floor = ("days and cost: steps alone, without failures, restarts, checkpoints, evaluation and idle devices",)
    for sentence in (*result.assumptions, *(floor if budget else ())):
        sys.stdout.write(f"{sentence}\n")


def _describe_plan(best: EstimatedPlan) -> list[tuple[str, str]]:
    plan = best.plan
    return [
        ("devices", str(plan.num_devices)),
        ("tensor x pipeline x data x context", f"{plan.tp} x {plan.pp} x {plan.dp} x {plan.cp}"),
        ("expert parallelism", str(plan.ep)),
        ("ZeRO stage", str(plan.zero_stage) + (f" within {plan.shard_group} ranks" if plan.shard_group else "")),
        ("micro-batch", str(plan.micro_batch_size)),
        ("schedule", plan.schedule + (f", {plan.virtual_stages} chunks a stage" if plan.virtual_stages > 1 else "")),
        ("recomputation", plan.recomputation),
        ("step time", format_seconds(best.step_time_s)),
        ("memory of the fullest device", format_bytes(best.memory_bytes)),
        ("energy of a step", _format_energy(best.energy_j)),
    ]


def _describe_throughput(request: Request[ModelShape], result: PlanningResult) -> list[tuple[str, str]]:
    assert result.throughput is not None
    smallest = min(device.memory_bytes for device in request.cluster.accelerators)
    return [
        ("memory of the smallest device", f"{format_bytes(smallest)}, {request.limits.memory_headroom:.0%} kept free"),
        ("sequences of a step", f"{request.global_batch} of {request.model.sequence} tokens"),
        ("tokens a second", format_count(result.throughput.tokens_per_s)),
        ("model FLOP/s utilization", f"{result.throughput.mfu:.1%}"),
    ]


def _describe_budget(budget: Budget) -> list[tuple[str, str]]:
    rows = [
        (f"{format_count(budget.num_tokens)} tokens", f"at least {budget.days:.1f} days, {budget.num_steps} steps"),
        ("device hours", f"at least {format_count(budget.device_hours)}"),
    ]
    return rows if budget.cost is None else [*rows, ("cost", f"at least {budget.cost:,.0f}")]


def _format_energy(energy_j: float | None) -> str:
    if energy_j is None:
        return "not known"
    for unit, size in (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3)):
        if energy_j >= size:
            return f"{energy_j / size:.3g} {unit}"
    return f"{energy_j:.3g} J"


def _summarize(candidate: EstimatedPlan) -> tuple[str, str, str, str]:
    return (
        describe_plan_shortly(candidate.plan),
        format_seconds(candidate.step_time_s),
        format_bytes(candidate.memory_bytes),
        _format_energy(candidate.energy_j),
    )


def _list_items(items: dict[str, float], factor: float) -> list[tuple[str, str, str]]:
    total = sum(items.values())
    kept = sorted(((name, value) for name, value in items.items() if value > 0), key=lambda item: -item[1])
    rows = [(name.replace("_", " "), f"{value * factor:.4g}", f"{value / total:.1%}") for name, value in kept]
    return [*rows, ("total", f"{total * factor:.4g}", "")]


def _show_rejected(result: PlanningResult) -> None:
    rows = [(rule, f"{count} layout{'s' if count != 1 else ''}") for rule, count in result.rejected_layouts.items()]
    rows += [(rule, f"{count} plan{'s' if count != 1 else ''}") for rule, count in result.rejected_candidates.items()]
    title = f"{result.num_candidates} plans priced, {result.num_fitting} fit; rejected"
    show_table(title, ("rule", "how many"), rows or [("nothing", "0 plans")])


def show_curve(curve: ScalingCurve) -> None:
    """Show a scaling curve with what it is held against and what it rests on."""
    rows = [tuple(str(value) for value in row) for row in curve.rows]
    show_table(curve.claim, curve.header, rows)
    for sentence in (curve.finding, *curve.assumptions):
        sys.stdout.write(f"{sentence}\n")


def show_cluster(cluster: Cluster) -> None:
    """Show what is known of a measured machine."""
    device = cluster.accelerators[0]
    peaks = [(f"{name} matmuls", f"{format_count(rate)} FLOP/s") for name, rate in device.peak_flops.items()]
    shares = device.constants
    attention = shares.attention_fraction * shares.matmul_fraction * device.get_peak_flops("bf16")
    elementwise = shares.memory_fraction * device.memory_bandwidth_bytes_per_s
    show_table(
        "This machine",
        ("", ""),
        [
            ("device", f"{cluster.num_devices} x {device.name}"),
            *peaks,
            ("bf16 attention", f"{format_count(attention)} FLOP/s"),
            ("memory", format_bytes(device.memory_bytes)),
            ("memory bandwidth", f"{format_bytes(device.memory_bandwidth_bytes_per_s)}/s"),
            ("elementwise kernels", f"{format_bytes(elementwise)}/s"),
            ("issuing a kernel", f"{shares.launch_s * 1e6:.3g} us"),
            ("message between processes", f"{device.scale_up.alpha_s * 1e6:.3g} us"),
            ("link between processes", f"{format_bytes(device.scale_up.bandwidth_bytes_per_s)}/s"),
        ],
    )


def show_collectives(measured: Sequence[MeasuredCollective]) -> None:
    """Show collectives as they ran between processes, beside what the measured link says of their messages."""
    rows = [
        (
            row.name.replace("_", " "),
            format_bytes(row.buffer_bytes),
            format_bytes(row.sent_bytes),
            f"{1e3 * row.estimated_s:.3g}",
            f"{1e3 * row.measured_s:.3g}",
            f"{row.measured_s / row.estimated_s:.1f}",
        )
        for row in measured
    ]
    title = f"Collectives between {measured[0].world_size} processes of this machine"
    header = ("collective", "buffer", "a rank sends", "estimated, ms", "measured, ms", "ratio")
    show_table(title, header, rows)


def show_check(result: PlanningResult, checked: Checked) -> None:
    """Show predicted against measured."""
    show_table("The plan for this machine", ("", ""), _describe_plan(result.best))
    show_table(
        f"Predicted against measured, {checked.num_steps} steps",
        ("", "predicted", "measured", "predicted / measured"),
        [
            (
                "step time",
                format_seconds(checked.predicted_s),
                format_seconds(checked.measured_s),
                f"{checked.time_ratio:.2f}",
            ),
            (
                "memory",
                format_bytes(checked.predicted_bytes),
                format_bytes(checked.measured_bytes),
                f"{checked.predicted_bytes / checked.measured_bytes:.2f}" if checked.measured_bytes else "-",
            ),
        ],
    )


def show_ranking(ranking: PlanRanking) -> None:
    """Show plans that ran on local ranks, predicted beside measured, the fastest first."""
    rows = [
        (
            row.description,
            format_seconds(row.predicted_s),
            format_seconds(row.measured_s),
            f"{row.time_ratio:.2f}",
            format_bytes(row.predicted_bytes),
            format_bytes(row.measured_bytes),
        )
        for row in sorted(ranking.rows, key=lambda row: row.measured_s)
    ]
    title = f"Plans on {ranking.num_ranks} ranks that share {ranking.num_cores} cores, predicted against measured"
    header = ("plan", "step, predicted", "measured", "ratio", "memory, predicted", "measured")
    show_table(title, header, rows)
    sys.stdout.write(
        f"Spearman's rank correlation: {ranking.time_correlation:.2f} of step times, "
        f"{ranking.memory_correlation:.2f} of memory\n"
    )
