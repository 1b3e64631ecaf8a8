"""What every benchmark does alike: run the sides in turns, take medians, print the whole table, save it.

A side is a name and a function that does the work once and returns its rate (higher is better). All sides run in each
round, one after the other, so that a noisy machine disturbs them alike; the first round warms up and is not counted.
A side that cannot run here is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from deepseek.core.machine import describe_machine, describe_versions


@dataclass(frozen=True)
class Side:
    """One way of doing the work; `run` returns its rate, and is `None` for a peer that is not here."""

    name: str
    run: Callable[[], float] | None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Rates of one side."""

    name: str
    median: float | None
    lowest: float | None
    highest: float | None
    note: str


@dataclass(frozen=True)
class Bar:
    """A goal, and what was measured."""

    name: str
    value: float | None
    goal: float
    at_least: bool = True


def parse_arguments(claim: str) -> argparse.Namespace:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=claim)
    add_options(parser)
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--json", type=Path, help="also write the result to this file as JSON")
    parser.add_argument("--markdown", type=Path, help="also write the result to this file as Markdown")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, to see that it runs")


def measure(sides: Sequence[Side], *, num_rounds: int) -> list[Row]:
    """Rates of all sides over `num_rounds` rounds in which they take turns, after one that does not count."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for round_index in track(range(num_rounds + 1), description="rounds", console=Console(stderr=True)):
        for side in sides:
            if side.run is not None:
                rate = side.run()
                if round_index > 0:
                    rates[side.name].append(rate)
    return [_summarize(side, rates[side.name]) for side in sides]


def ratio(rows: Sequence[Row], name: str, reference: str) -> float | None:
    """Return the median of one side over that of another; `None` where one did not run."""
    medians = {row.name: row.median for row in rows}
    ours, theirs = medians[name], medians[reference]
    return None if ours is None or theirs is None else ours / theirs


def report(name: str, unit: str, rows: Sequence[Row], bars: Sequence[Bar], arguments: argparse.Namespace) -> None:
    """Print the table and the bars, and write them where the arguments say."""
    _print(name, unit, rows, bars)
    if arguments.json:
        write_json(arguments.json, name, unit, [asdict(row) for row in rows], bars)
    if arguments.markdown:
        arguments.markdown.write_text(_markdown(name, unit, rows, bars), encoding="utf-8")


def write_json(
    path: Path,
    name: str,
    unit: str,
    rows: Sequence[Mapping[str, object]],
    bars: Sequence[Bar],
    **more: object,
) -> None:
    """Write a result in the form that every benchmark has; `more` is what only this one measures."""
    result = {
        "name": name,
        "unit": unit,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "rows": list(rows),
        "bars": [asdict(bar) for bar in bars],
        **more,
    }
    path.write_text(json.dumps(result, indent=2), encoding="utf-8")


def _summarize(side: Side, rates: list[float]) -> Row:
    if not rates:
        return Row(side.name, None, None, None, side.note or "not installed")
    return Row(side.name, statistics.median(rates), min(rates), max(rates), side.note)


def _print(name: str, unit: str, rows: Sequence[Row], bars: Sequence[Bar]) -> None:
    table = Table(title=f"{name}, {unit}", title_justify="left")
    for column in ("side", "median", "lowest", "highest", "note"):
        table.add_column(column, justify="left" if column in ("side", "note") else "right")
    for row in rows:
        table.add_row(row.name, *(_number(value) for value in (row.median, row.lowest, row.highest)), row.note)
    Console().print(table)
    print_bars(bars)


def print_bars(bars: Sequence[Bar]) -> None:
    """Print each goal beside what was measured."""
    for bar in bars:
        Console().print(f"{bar.name}: {_number(bar.value)}  (goal {'>=' if bar.at_least else '<='} {bar.goal:g})")


def _markdown(name: str, unit: str, rows: Sequence[Row], bars: Sequence[Bar]) -> str:
    machine, versions = describe_machine(), describe_versions()
    lines = [
        f"# {name}",
        "",
        f"Command: `python -m benchmarks.{name}`. Commit: {_commit()}. Date: {datetime.now(UTC).date()}.",
        f"Machine: {machine['processor']}, {machine['num_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB.",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in versions.items()) + ".",
        "",
        f"| side | median, {unit} | lowest | highest | note |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        numbers = " | ".join(_number(value) for value in (row.median, row.lowest, row.highest))
        lines.append(f"| {row.name} | {numbers} | {row.note} |")
    lines += ["", "| bar | measured | goal |", "|---|---:|---:|"]
    lines += [f"| {bar.name} | {_number(bar.value)} | {'>=' if bar.at_least else '<='} {bar.goal:g} |" for bar in bars]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"
