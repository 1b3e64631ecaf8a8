"""What `explain()` says: graphs, breaks, rewritten control flow, fusions, peak memory, as text and as a dictionary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.compiler.jit.backend import Captured, report_on
from deepseek.compiler.jit.jit_options import JitOptions
from deepseek.compiler.jit.rewriting.parsing import describe
from deepseek.compiler.jit.tracing.sites import Site, Trace
from deepseek.core.units import format_bytes


@dataclass(frozen=True)
class Rewritten:
    """One piece of the user's control flow that became a part of the graph, or a break between two graphs."""

    file: str
    line: int
    kind: str
    text: str
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """The outcome of compiling a function for one set of arguments."""

    function: str
    num_graphs: int
    num_operators: int
    rewritten: tuple[Rewritten, ...]
    breaks: tuple[Rewritten, ...]
    fusions: tuple[str, ...]
    peak_bytes_before: int | None
    peak_bytes_after: int | None
    notes: tuple[str, ...] = ()
    placements: tuple[str, ...] = ()
    """Which device runs what, for each graph, where several devices were given."""

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.function}: {_count(self.num_graphs, 'graph')}, {_count(self.num_operators, 'operator')}"]
        lines += _section("rewritten control flow", [_show(statement) for statement in self.rewritten])
        lines += _section("graph breaks", [_show(statement) for statement in self.breaks])
        lines += _section("fusions", list(self.fusions))
        if self.peak_bytes_before is not None and self.peak_bytes_after is not None:
            before, after = format_bytes(self.peak_bytes_before), format_bytes(self.peak_bytes_after)
            lines.append(f"peak memory: {before} before, {after} after")
        lines += [f"devices: {placement}" for placement in self.placements]
        return "\n".join([*lines, *self.notes])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _section(title: str, rows: list[str]) -> list[str]:
    return [f"{title}: {'none' if not rows else ''}".rstrip(), *(f"  {row}" for row in rows)]


def _show(statement: Rewritten) -> str:
    line = f"{Path(statement.file).name}:{statement.line}"
    reason = f"\n    {statement.reason}" if statement.reason else ""
    return f"{line:24} {statement.kind:12} {statement.text}{reason}"


def explain_captured(
    function: Any, captured: Captured, trace: Trace, earlier: Trace, options: JitOptions
) -> Explanation:
    """Return the explanation of graphs that were captured, with the breaks that calls met `earlier`."""
    breaks = {site.key: _describe_site(site, reason) for site, reason in [*earlier.breaks, *trace.breaks]}
    reports, notes = [], []
    for graph_module, inputs, is_training in captured.graphs if options.optimize else []:
        try:
            reports.append(report_on(graph_module, inputs, options, is_training=is_training))
        except Exception as error:  # noqa: BLE001 - an explanation is given all the same, and says what is missing
            notes.append(f"fusions and memory of this graph are not known: {str(error).strip().partition(chr(10))[0]}")
    fusions = tuple(f"{fusion.rule} at {fusion.where}" for report in reports for fusion in report.fusion.fusions)
    peaks = [(report.memory.peak_before_bytes, report.memory.peak_in_place_bytes) for report in reports]
    return Explanation(
        function=describe(function),
        num_graphs=len(captured.graphs),
        num_operators=sum(count_operators(graph) for graph, _, _ in captured.graphs),
        rewritten=tuple(
            _describe_site(site) for site in sorted(trace.rewritten, key=lambda site: (site.file, site.line))
        ),
        breaks=tuple(breaks.values()),
        fusions=fusions,
        peak_bytes_before=max((before for before, _ in peaks), default=None),
        peak_bytes_after=max((after for _, after in peaks), default=None),
        notes=tuple(notes),
        placements=tuple(str(report.placement) for report in reports if report.placement is not None),
    )


def count_operators(graph_module: Any) -> int:
    """Return the number of operators in a graph and its branches."""
    return sum(
        node.op in ("call_function", "call_method", "call_module")
        for module in graph_module.modules()
        for node in getattr(getattr(module, "graph", None), "nodes", [])
    )


def _describe_site(site: Site, reason: str = "") -> Rewritten:
    return Rewritten(site.file, site.line, site.kind, site.text, reason)
