"""Plans on a screen and as pictures: what `deepseek plan` found, as tables, and the pipeline's timeline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.screen.plots import COLORS
from deepseek.cli.screen.tables import show_table
from deepseek.core.errors import ConfigError
from deepseek.core.storage import write_file
from deepseek.core.units import format_bytes, format_count, format_seconds
from deepseek.distributed.plan import Plan
from deepseek.planning.estimate.columns import describe_case, stack_cases
from deepseek.planning.estimate.simulation import Timeline, simulate
from deepseek.planning.estimate.step import list_stage_work
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.software import MODERN, Software
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.scaling import ScalingCurve
from deepseek.planning.search.results import EstimatedPlan, PlanningResult, describe_plan_shortly

if TYPE_CHECKING:
    from deepseek.bench.plan_check import Checked

_FRONT_SHOWN = 8
_ROUNDS_DRAWN = 4  # micro-batches per stage; a longer steady state looks like a shorter one


def show_result(result: PlanningResult, top: int) -> None:
    """Show everything that a search found, as tables."""
    best = result.best
    show_table("The fastest plan", ("", ""), _describe_plan(best))
    if result.placement is not None:
        kind = "stage" if result.placement.is_by_stage else "replica"
        rows = [
            (str(index), share.accelerator, str(share.num_devices), str(share.layers), str(share.micro_batches))
            for index, share in enumerate(result.placement.shares)
        ]
        show_table(f"What each {kind} gets", (kind, "device", "devices", "layers", "micro-batches"), rows)
    show_table("Time of one step", ("item", "ms", "share"), _list_items(best.time_items_s, 1e3))
    show_table("Memory of the fullest device", ("item", "GB", "share"), _list_items(best.memory_items_bytes, 1e-9))
    runners = [(*_summarize(each.candidate), each.reason) for each in result.runners_up[:top]]
    if runners:
        show_table("Runners-up", ("plan", "step", "memory", "energy", "why it is worse"), runners)
    front = [_summarize(each) for each in result.front[:_FRONT_SHOWN]]
    title = f"No other plan beats these in time, memory and energy at once ({len(result.front)} in all)"
    show_table(title, ("plan", "step", "memory", "energy"), front)
    _show_rejected(result)
    for sentence in result.assumptions:
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


def _format_energy(energy_j: float | None) -> str:
    if energy_j is None:
        return "not known"
    return f"{energy_j / 1e3:.3g} kJ" if energy_j >= 1000 else f"{energy_j:.3g} J"


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
    rows = [(rule, f"{count} layouts") for rule, count in result.rejected_layouts.items()]
    rows += [(rule, f"{count} plans") for rule, count in result.rejected_candidates.items()]
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
    peaks = [(f"{name} products", f"{format_count(rate)} FLOP/s") for name, rate in device.peak_flops.items()]
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


def draw_picture(
    model: ModelShape, cluster: Cluster, plan: Plan, global_batch: int, path: Path, software: Software = MODERN
) -> None:
    """Plot the timeline of a plan's pipeline; a plan without one is a single row."""
    count = plan.count_micro_batches(global_batch)
    drawn = min(count, _ROUNDS_DRAWN * plan.pp)
    works = list_stage_work(stack_cases([describe_case(model, cluster, plan, global_batch, software)]))
    timeline = simulate(plan.schedule, works, drawn, virtual_stages=plan.virtual_stages)
    shown = f"the first {drawn} of {count} micro-batches" if drawn < count else f"{count} micro-batches"
    title = f"{model.name or 'model'}: {describe_plan_shortly(plan)}, {shown}"
    if path.suffix == ".png":
        from deepseek.cli.screen.plots import draw_timeline

        draw_timeline(timeline, title, path)
    elif path.suffix in (".html", ".svg"):
        svg = draw_svg(timeline, title)
        page = f"<!doctype html><meta charset='utf-8'><title>{_escape(title)}</title>\n{svg}"
        write_file(path, (page if path.suffix == ".html" else svg).encode())
    else:
        raise ConfigError(f"{path} is no .png, .html or .svg file; choose one of these endings")


_WIDTH, _ROW, _GAP, _LEFT, _TOP = 1200, 24, 4, 70, 56


def draw_svg(timeline: Timeline, title: str) -> str:
    """Plot a timeline as SVG: one row per stage, one box per pass, which says what it is when pointed at."""
    scale = (_WIDTH - _LEFT - 10) / timeline.step_time_s
    height = _TOP + timeline.num_stages * (_ROW + _GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="15">{_escape(title)}</text>',
        *_draw_legend(timeline),
    ]
    for stage in range(timeline.num_stages):
        y = _TOP + stage * (_ROW + _GAP)
        parts.append(f'<text x="10" y="{y + 16}">stage {stage}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - 10}" height="{_ROW}" fill="#eeeeee"/>')
    for event in timeline.events:
        x, width = _LEFT + event.start_s * scale, (event.end_s - event.start_s) * scale
        y = _TOP + event.stage * (_ROW + _GAP)
        opacity = 1.0 - 0.5 * (event.work.chunk % 4) / 4
        label = f"{event.work.kind} of micro-batch {event.work.micro_batch}, chunk {event.work.chunk}: " + (
            f"{1e3 * event.start_s:.3f} to {1e3 * event.end_s:.3f} ms"
        )
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW}" fill="{COLORS[event.work.kind]}" '
            f'fill-opacity="{opacity:.2f}" stroke="white" stroke-width="0.5"><title>{label}</title></rect>'
        )
        if width > 16:
            parts.append(
                f'<text x="{x + width / 2:.2f}" y="{y + 16}" fill="white" text-anchor="middle">'
                f"{event.work.micro_batch}</text>"
            )
    return "\n".join([*parts, "</svg>\n"])


def _draw_legend(timeline: Timeline) -> list[str]:
    kinds = [kind for kind in COLORS if any(event.work.kind == kind for event in timeline.events)]
    parts = []
    for place, kind in enumerate(kinds):
        x = 10 + 110 * place
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{COLORS[kind]}"/>')
        parts.append(f'<text x="{x + 18}" y="43">{kind}</text>')
    ends = f"{format_seconds(timeline.step_time_s)}, {timeline.bubble_fraction:.1%} waiting"
    return [*parts, f'<text x="{10 + 110 * len(kinds)}" y="43">{ends}</text>']


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
