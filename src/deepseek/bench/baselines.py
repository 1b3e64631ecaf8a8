"""Rows of an earlier benchmark, and what has become worse since; pure policy on JSON values.

On the machine that the baseline was measured on, latencies and peak memory are compared as they are. On another one
they mean nothing, and each row's speed over the first row is compared instead. Accuracy is compared on both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.core.errors import ConfigError
from deepseek.core.storage import explained_storage, write_file

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One subject, measured: medians over the rounds; `None` throughout for a subject that could not run, by `note`."""

    name: str
    backend: str
    precision: str
    batch_size: int
    latency_ms: float | None = None
    """Median time of one forward pass of the whole batch."""
    latency_p95_ms: float | None = None
    """The time that one pass in twenty exceeds."""
    throughput_per_s: float | None = None
    """Samples per second: batch size over latency."""
    memory_bytes: int | None = None
    """Peak memory of the process (of the device on a GPU) while it runs, weights and libraries included."""
    agreement: float | None = None
    """Share of samples with the same answer (largest output) as FP32 eager."""
    cosine: float | None = None
    """Least cosine between the outputs of a sample and those of FP32 eager."""
    accuracy: float | None = None
    """Share of right answers on labelled data, where there is some."""
    note: str = ""


@dataclass(frozen=True)
class Regression:
    """One figure of one row that is worse than before by more than the tolerance."""

    name: str
    batch_size: int
    figure: str
    before: float
    now: float

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch_size}: {self.figure} was {self.before:.4g} and is {self.now:.4g}"


def save_baseline(path: Path, rows: Sequence[Row], *, model: str, machine: Mapping[str, Any]) -> None:
    """Write `rows` of `model` on `machine` to `path`, whole or not at all."""
    content = {"schema": SCHEMA, "model": model, "machine": dict(machine), "rows": [asdict(row) for row in rows]}
    with explained_storage(path):
        write_file(path, json.dumps(content, indent=2).encode())


def find_regressions(
    path: Path, rows: Sequence[Row], *, model: str, machine: Mapping[str, Any], tolerance: float
) -> list[Regression]:
    """Return where `rows` is worse than the baseline in `path` by more than the share `tolerance` (0.1 is ten percent).

    A row that the baseline lacks has nothing to be compared with; one that ran then and does not run now is a
    regression of its latency to infinity. Raises `ConfigError` for a file that is no baseline, or is another model's.
    """
    before, same_machine = _read(path, model, machine)
    found: list[Regression] = []
    for now in rows:
        if (then := before.get((now.name, now.batch_size))) is not None:
            for figure, old, new, worse in _figures(then, now, before, rows, same_machine):
                if worse > 1 + tolerance:
                    found.append(Regression(now.name, now.batch_size, figure, old, new))
    return found


def _read(path: Path, model: str, machine: Mapping[str, Any]) -> tuple[dict[tuple[str, int], Row], bool]:
    with explained_storage(path):
        text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        rows = [Row(**row) for row in content["rows"]]
        schema, about = content["schema"], content["model"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a baseline of this benchmark ({error}); write one with --save-baseline"
        ) from error
    if schema != SCHEMA:
        raise ConfigError(f"{path} has schema {schema} and {SCHEMA} is read here; write it anew with --save-baseline")
    if about != model:
        raise ConfigError(f"{path} is the baseline of {about} and {model} was measured; give the baseline of {model}")
    return {(row.name, row.batch_size): row for row in rows}, content["machine"] == dict(machine)


def _figures(
    then: Row, now: Row, before: Mapping[tuple[str, int], Row], rows: Sequence[Row], same_machine: bool
) -> list[tuple[str, float, float, float]]:
    """(figure, before, now, how many times worse) of what both have."""
    figures = []
    if then.latency_ms is not None and now.latency_ms is None:
        figures.append(("latency_ms", then.latency_ms, float("inf"), float("inf")))
    if then.latency_ms is not None and now.latency_ms is not None:
        if same_machine:
            figures.append(("latency_ms", then.latency_ms, now.latency_ms, now.latency_ms / then.latency_ms))
        elif (speeds := _speeds(then, now, list(before.values()), rows)) is not None:
            figures.append(("speed over the first row", *speeds, speeds[0] / speeds[1]))
    if same_machine and then.memory_bytes and now.memory_bytes:
        figures.append(("memory_bytes", then.memory_bytes, now.memory_bytes, now.memory_bytes / then.memory_bytes))
    for figure in ("agreement", "accuracy"):
        old, new = getattr(then, figure), getattr(now, figure)
        if old is not None and new is not None:
            figures.append((figure, old, new, 1 + old - new))
    return figures


def _speeds(then: Row, now: Row, before: Sequence[Row], rows: Sequence[Row]) -> tuple[float, float] | None:
    """Speed of one row over the first row of its batch size, before and now."""
    speeds = []
    for row, table in ((then, before), (now, rows)):
        first = next((other for other in table if other.batch_size == row.batch_size), None)
        if first is None or first.latency_ms is None or row.latency_ms is None:
            return None
        speeds.append(first.latency_ms / row.latency_ms)
    return speeds[0], speeds[1]
