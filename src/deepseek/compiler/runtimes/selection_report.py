"""A decision in words and rows: who won, by how much, what was refused and why. No tensors here.

The columns: median time of a call, speed over eager FP32, relative error, cosine and share of rows with the same
largest entry, the last three against eager FP32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek.compiler.runtimes.selection_policy import NOT_TRIED, Decision, Measurement

COLUMNS = ("candidate", "ms", "speed-up", "error", "cosine", "top-1")


def summarize(decision: Decision) -> str:
    """Who won, by how much, and after what search, in a sentence."""
    winner, num_untried = decision.winner, len(list_untried(decision))
    speed = decision.baseline_ms / winner.median_ms
    source = "remembered" if decision.is_remembered else f"measured in {decision.spent_s:.0f} s"
    return (
        f"{decision.chosen}: {winner.median_ms:.3g} ms a call, {speed:.2f} times {decision.reference} "
        f"({decision.baseline_ms:.3g} ms); {source}, {len(decision.measurements)} candidates ran, "
        f"{len(list_refusals(decision))} were refused" + (f", {num_untried} not tried" if num_untried else "")
    )


def list_rows(decision: Decision) -> list[tuple[str, ...]]:
    """One row for each candidate that ran, fastest first."""
    ranked = sorted(
        decision.measurements, key=lambda measurement: (measurement.candidate != decision.chosen, measurement.median_ms)
    )
    return [_row(measurement, decision) for measurement in ranked]


def list_refusals(decision: Decision) -> list[tuple[str, ...]]:
    """One row for each candidate that was refused, with the reason."""
    rejections = decision.rejections
    return [(lost.candidate, lost.reason) for lost in rejections if not lost.reason.startswith(NOT_TRIED)]


def list_untried(decision: Decision) -> list[tuple[str, ...]]:
    """One row for each candidate that might have run and was not built, with the reason."""
    rejections = decision.rejections
    return [
        (lost.candidate, lost.reason.removeprefix(NOT_TRIED))
        for lost in rejections
        if lost.reason.startswith(NOT_TRIED)
    ]


def list_notes(decision: Decision) -> list[tuple[str, ...]]:
    """One row for each thing that a candidate that ran did otherwise than asked, or that is worth knowing of it."""
    return [
        (str(measurement.candidate), said)
        for measurement in decision.measurements
        for said in (*measurement.findings, *measurement.notes)
    ]


def describe_key(key: Mapping[str, Any]) -> str:
    """Return the part of a key that people ask about: inputs, precision, threads, processor."""
    inputs = ", ".join(f"{kind}{shape}" for shape, kind in key.get("inputs", ()))
    machine = key.get("machine", {})
    return (
        f"{inputs}; {' or '.join(key.get('precisions', ()))}; {key.get('num_threads')} threads of "
        f"{machine.get('processor')}"
    )


def explain(decision: Decision) -> str:
    """Return the whole decision as text."""
    lines = [summarize(decision), ""]
    rows = [COLUMNS, *list_rows(decision)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", *(f"{candidate}: {said}" for candidate, said in list_notes(decision))]
    lines += ["", *(f"refused: {candidate}: {reason}" for candidate, reason in list_refusals(decision))]
    lines += [f"{NOT_TRIED}{candidate}: {reason}" for candidate, reason in list_untried(decision)]
    return "\n".join(lines).rstrip()


def _row(measurement: Measurement, decision: Decision) -> tuple[str, ...]:
    numbers = measurement.numbers
    agreement = numbers.raw_agreement
    return (
        str(measurement.candidate),
        f"{measurement.median_ms:.3g}",
        f"{decision.baseline_ms / measurement.median_ms:.2f}",
        f"{numbers.relative_error:.2g}",
        f"{numbers.cosine:.5f}",
        "" if agreement is None else f"{agreement:.2f}",
    )
