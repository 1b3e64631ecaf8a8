"""The timeline of a plan's pipeline as a picture: PNG, SVG, or an HTML page that fetches nothing."""

from __future__ import annotations

from pathlib import Path

from deepseek.cli.screen.plots import COLORS, plot_timeline
from deepseek.core.errors import ConfigError
from deepseek.core.storage import write_file
from deepseek.core.units import format_seconds
from deepseek.planning.estimate.columns import describe_case, stack_cases
from deepseek.planning.estimate.simulation import Timeline, simulate
from deepseek.planning.estimate.step import list_stage_work
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.search.request import Request
from deepseek.planning.search.results import PlanningResult, describe_plan_shortly

ENDINGS = (".png", ".html", ".svg")
_ROUNDS_SHOWN = 4  # micro-batches per stage; a longer steady state looks the same as a shorter one


def check_ending(path: Path) -> None:
    """Refuse a picture of a kind that is not plotted."""
    if path.suffix not in ENDINGS:
        raise ConfigError(f"{path} is no .png, .html or .svg file; choose one of these endings")


def plot_plan(request: Request[ModelShape], result: PlanningResult, path: Path) -> None:
    """Plot the timeline of the best plan's pipeline; a plan without one is a single row."""
    check_ending(path)
    plan, model = result.best.plan, request.model
    count = plan.count_micro_batches(request.global_batch)
    shown = min(count, _ROUNDS_SHOWN * plan.pp)
    case = describe_case(model, request.cluster, plan, request.global_batch, result.software)
    timeline = simulate(plan.schedule, list_stage_work(stack_cases([case])), shown, virtual_stages=plan.virtual_stages)
    part = f"the first {shown} of {count} micro-batches" if shown < count else f"{count} micro-batches"
    title = f"{model.name or 'model'}: {describe_plan_shortly(plan)}, {part}"
    if path.suffix == ".png":
        plot_timeline(timeline, title, path)
        return
    svg = plot_svg(timeline, title)
    page = f"<!doctype html><meta charset='utf-8'><title>{_escape(title)}</title>\n{svg}"
    write_file(path, (page if path.suffix == ".html" else svg).encode())


_WIDTH, _ROW, _GAP, _LEFT, _TOP = 1200, 24, 4, 70, 56


def plot_svg(timeline: Timeline, title: str) -> str:
    """Plot a timeline as SVG: one row per stage, one box per pass, which says what it is when pointed at."""
    scale = (_WIDTH - _LEFT - 10) / timeline.step_time_s
    height = _TOP + timeline.num_stages * (_ROW + _GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="15">{_escape(title)}</text>',
        *_plot_legend(timeline),
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


def _plot_legend(timeline: Timeline) -> list[str]:
    kinds = [kind for kind in COLORS if any(event.work.kind == kind for event in timeline.events)]
    parts = []
    for index, kind in enumerate(kinds):
        x = 10 + 110 * index
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{COLORS[kind]}"/>')
        parts.append(f'<text x="{x + 18}" y="43">{kind}</text>')
    ends = f"{format_seconds(timeline.step_time_s)}, {timeline.bubble_fraction:.1%} waiting"
    return [*parts, f'<text x="{10 + 110 * len(kinds)}" y="43">{ends}</text>']


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
