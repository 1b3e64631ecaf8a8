"""The page `memory.html` of a run: bytes over one step by kind, who holds them at the peak, and whether they grow.

One file without anything from elsewhere; light or dark as the browser is.
"""

from __future__ import annotations

import html
import string
from collections.abc import Sequence
from typing import NamedTuple

from deepseek.core.units import format_bytes
from deepseek.train.allocations import KINDS
from deepseek.train.events import MemoryLeakSuspected
from deepseek.train.step_memory import StepMemory

_WIDTH, _HEIGHT, _LEFT, _TOP = 960, 300, 70, 22
_NUM_POINTS = 400  # that a chart of this width can show
_LEAST_LABEL = 60  # width of a phase that has room for its name
_COLORS = {
    "parameters": "#4269d0",
    "optimizer state": "#6cc5b0",
    "gradients": "#a463f2",
    "activations": "#efb118",
    "temporary": "#ff725c",
    "other": "#9498a0",
}


class Area(NamedTuple):
    """One kind in the chart."""

    kind: str
    color: str
    path: str
    """Of SVG."""
    peak: str


class PhaseSpan(NamedTuple):
    """A phase of the step along the axis."""

    name: str
    x: float
    width: float


def render_memory(measured: StepMemory, looks: Sequence[tuple[int, int]], leaks: Sequence[MemoryLeakSuspected]) -> str:
    """Return the page; `looks` are steps with the bytes of all tensors after them."""
    areas = draw_areas(measured, _top_bytes(measured))
    legend = "".join(
        f'<span><i style="background: {area.color}"></i>{area.kind}, {area.peak} at the peak</span>\n' for area in areas
    )
    allocator = ""
    if measured.allocator_peak_bytes is not None:
        allocator = f" torch's allocator had handed out {format_bytes(measured.allocator_peak_bytes)} at the most."
    return _PAGE.substitute(
        step=measured.step,
        peak=format_bytes(measured.peak_bytes),
        duration=_ms(measured.duration_s),
        allocator=allocator,
        legend=legend,
        chart=_draw_chart(measured, areas),
        holders=_list_holders(measured),
        leaks=_list_leaks(looks, leaks),
        looks=_draw_looks(looks),
    )


def _draw_chart(measured: StepMemory, areas: Sequence[Area]) -> str:
    top_bytes = _top_bytes(measured)
    parts = []
    for num_bytes in (share * measured.peak_bytes for share in _TICKS):
        y = f"{_y(num_bytes, top_bytes):.1f}"
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{format_bytes(num_bytes)}</text>')
    parts += [f'<path d="{area.path}" fill="{area.color}"><title>{area.kind}</title></path>' for area in areas]
    for span in find_spans(measured):
        parts.append(f'<line class="rule" x1="{span.x:.1f}" x2="{span.x:.1f}" y1="0" y2="{_HEIGHT}"/>')
        parts.append(f'<text x="{span.x + 5:.1f}" y="12">{span.name}</text>')
    peak_x = f"{_x(measured.peak_s, measured):.1f}"
    parts.append(f'<line class="peak" x1="{peak_x}" x2="{peak_x}" y1="{_TOP}" y2="{_HEIGHT}"/>')
    for at_s in (share * measured.duration_s for share in _TICKS):
        x = f"{_x(at_s, measured):.1f}"
        parts.append(f'<text x="{x}" y="{_HEIGHT + 18}" text-anchor="middle">{_ms(at_s)}</text>')
    label = "Bytes alive over the step, by kind"
    return _draw_svg(_HEIGHT + 24, label, parts)


def _list_holders(measured: StepMemory) -> str:
    largest = max((holder.num_bytes for holder in measured.holders), default=1)
    rows = []
    for holder in measured.holders:
        color = _COLORS[holder.kind]
        width = f"{100 * holder.num_bytes / largest:.1f}%"
        rows.append(
            f"<tr><td>{html.escape(holder.path) or _OUTSIDE}</td>"
            f'<td><i style="background: {color}"></i>{holder.kind}</td>'
            f'<td class="number">{format_bytes(holder.num_bytes)}</td>'
            f'<td><div class="bar" style="width: {width}; background: {color}"></div></td>'
            f'<td class="number">{holder.num_allocations}</td>'
            f'<td class="number">{_ms(holder.lifetime_s)}</td></tr>'
        )
    return "\n".join(rows)


def _list_leaks(looks: Sequence[tuple[int, int]], leaks: Sequence[MemoryLeakSuspected]) -> str:
    if not leaks:
        return f"<p>No leak was seen at {len(looks)} looks.</p>"
    return "\n".join(
        f'<div class="leak">Suspected leak, steps {leak.since_step} to {leak.step}: '
        f"{html.escape('; '.join(leak.tensors))} (module: {html.escape(', '.join(leak.modules))})</div>"
        for leak in leaks
    )


def _draw_looks(looks: Sequence[tuple[int, int]]) -> str:
    """The bytes after each look, from zero up."""
    if len(looks) < 2:
        return ""
    (first, first_bytes), (last, last_bytes) = looks[0], looks[-1]
    top_bytes = 1.1 * max(num_bytes for _, num_bytes in looks) or 1
    points = " ".join(
        f"{_LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT):.1f},{120 * (1 - num_bytes / top_bytes):.1f}"
        for step, num_bytes in looks
    )
    parts = [
        f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH}" y1="120" y2="120"/>',
        f'<polyline points="{points}" fill="none" stroke="{_COLORS["parameters"]}" stroke-width="2"/>',
    ]
    return (
        f"<p>Bytes of all tensors that Python knows of after a logged step: {format_bytes(first_bytes)} after step "
        f"{first}, {format_bytes(last_bytes)} after step {last}.</p>\n"
        + _draw_svg(124, "Bytes of tensors from step to step", parts)
    )


def _draw_svg(height: int, label: str, parts: Sequence[str]) -> str:
    return "\n".join([f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">', *parts, "</svg>"])


def draw_areas(measured: StepMemory, top_bytes: float) -> list[Area]:
    """Stack the kinds, the first at the bottom, as steps; of many points in one column the highest is shown."""
    columns: dict[int, tuple[float, tuple[int, ...]]] = {}
    for at_s, alive in measured.points:
        column = int(at_s / measured.duration_s * _NUM_POINTS)
        if column not in columns or sum(alive) > sum(columns[column][1]):
            columns[column] = (at_s, alive)
    points = list(columns.values())
    ends_s = [at_s for at_s, _ in points[1:]] + [measured.duration_s]
    areas = []
    for index, kind in enumerate(KINDS):
        upper, lower = [], []
        for (at_s, alive), end_s in zip(points, ends_s, strict=True):
            below, above = sum(alive[:index]), sum(alive[: index + 1])
            for x in (_x(at_s, measured), _x(end_s, measured)):
                upper.append(f"{x:.1f},{_y(above, top_bytes):.1f}")
                lower.append(f"{x:.1f},{_y(below, top_bytes):.1f}")
        path = f"M{' L'.join([*upper, *reversed(lower)])}Z"
        areas.append(Area(kind, _COLORS[kind], path, format_bytes(measured.peak_by_kind[kind])))
    return areas


def find_spans(measured: StepMemory) -> list[PhaseSpan]:
    """Return the phases that are wide enough to be named."""
    ends_s = [begin_s for _, begin_s in measured.phases[1:]] + [measured.duration_s]
    spans = [
        PhaseSpan(name, _x(begin_s, measured), _x(end_s, measured) - _x(begin_s, measured))
        for (name, begin_s), end_s in zip(measured.phases, ends_s, strict=True)
    ]
    return [span for span in spans if span.width >= _LEAST_LABEL]


def _x(at_s: float, measured: StepMemory) -> float:
    return _LEFT + at_s / measured.duration_s * (_WIDTH - _LEFT)


def _y(num_bytes: float, top_bytes: float) -> float:
    return _TOP + (_HEIGHT - _TOP) * (1 - num_bytes / max(top_bytes, 1))


def _top_bytes(measured: StepMemory) -> float:
    return measured.peak_bytes * 1.08


def _ms(duration_s: float) -> str:
    return f"{duration_s * 1000:.1f} ms"


_TICKS = (0, 0.25, 0.5, 0.75, 1)
_OUTSIDE = "outside of the model"
_PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Memory of a training step</title>
<style>
  :root { color-scheme: light dark; --ink: #1b1e23; --soft: #5c6470; --line: #d9dde3; --back: #fff; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa3ae; --line: #363b43; --back: #16181c; } }
  body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 1000px;
         margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
  p { color: var(--soft); margin: .25rem 0 1rem; } p b { color: var(--ink); }
  svg { width: 100%; height: auto; overflow: visible; }
  svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
  .rule { stroke: var(--line); } .peak { stroke: var(--ink); stroke-dasharray: 3 3; }
  .legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0; }
  .legend i, td i { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .4rem; }
  .scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
  th { color: var(--soft); font-weight: 500; } .number { text-align: right; }
  .bar { height: .6rem; border-radius: 2px; min-width: 1px; } .share { width: 30%; }
  .leak { border-left: 4px solid #d4380d; padding-left: .75rem; margin: .75rem 0; }
</style>
<h1>Memory of step $step</h1>
<p>At most <b>$peak</b> in tensors at once, over $duration, which recording has made longer.$allocator</p>
<div class="legend">
$legend</div>
$chart
<h2>Who holds it at the peak</h2>
<div class="scroll"><table>
<tr><th>module</th><th>kind</th><th class="number">bytes</th><th class="share"></th>
<th class="number">tensors</th><th class="number">alive for</th></tr>
$holders
</table></div>
<h2>From step to step</h2>
$leaks
$looks
</html>
""")
