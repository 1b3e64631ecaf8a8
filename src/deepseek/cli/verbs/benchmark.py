"""`deepseek benchmark`: one model as several generations, or backends and precisions, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek.bench.baselines import Row


def benchmark(
    model: str,
    /,
    *,
    generations: str = "v1.2,v2.3,v3.1,v4.2,v5.0",
    backends: str | None = None,
    precisions: str = "fp32,bf16,int8",
    batch_sizes: str = "1",
    rounds: int = 7,
    time_budget: float = 60.0,
    data: Path | None = None,
    save_baseline: Path | None = None,
    against: Path | None = None,
    tolerance: float = 0.1,
    json: bool = False,
) -> int:
    """Latency, throughput, memory and accuracy of one model, all sides in turns.

    A generation is one of the versions 1.0 to 6.0 of the engine that this product was built from: here, the arithmetic,
    quantization and compilation it had, with today's kernels on this machine. It is no version of this product.

    Exit status 1 when something is worse than the baseline by more than the tolerance.

    Example: deepseek benchmark resnet50 --batch-sizes 1,16 --save-baseline resnet50.json

    Parameters
    ----------
    model
        Name of the zoo (resnet50), artifact, Hugging Face folder or ONNX file.
    generations
        Generations of the engine to compare, with commas.
    backends
        Compare these backends (eager, inductor, onnxruntime, openvino, tvm, auto) instead of generations.
    precisions
        With `--backends`: fp32, bf16, int8.
    batch_sizes
        Samples in one pass; each size gives a table of its own.
    rounds
        Turns that each side takes.
    time_budget
        Seconds for one measured choice among backends.
    data
        A .npz file with arrays `inputs` and `labels`: what sides are measured with, what int8 is calibrated on (the
        first 64 rows, without their labels), and what accuracy is measured on.
    save_baseline
        Write the rows to this file, for a later `--against`.
    against
        Compare with this baseline.
    tolerance
        Share by which a figure may be worse than the baseline: 0.1 is ten percent.
    json
        Print events as JSON lines; the last one holds the rows.
    """
    from deepseek.bench.baselines import find_regressions
    from deepseek.bench.baselines import save_baseline as save
    from deepseek.bench.comparison import BenchConfig, Compared, compare
    from deepseek.bench.variants import subjects_of_generations, subjects_of_pairs
    from deepseek.bench.worker import native_precisions
    from deepseek.cli.screen.events import follow
    from deepseek.core.machine import describe_machine

    if backends is None:
        subjects = subjects_of_generations(_words(generations), native_precisions())
    else:
        subjects = subjects_of_pairs(_words(backends), _words(precisions))
    sizes = tuple(_whole_number(word) for word in _words(batch_sizes))
    config = BenchConfig(
        model=model,
        batch_sizes=sizes,
        num_rounds=rounds,
        time_budget_s=time_budget,
        data=None if data is None else str(data),
    )
    last = follow(compare(config, subjects), as_json=json)
    rows = last.rows if isinstance(last, Compared) else ()
    if not json:
        _show(model, rows)
    if save_baseline is not None:
        save(save_baseline, rows, model=model, machine=describe_machine())
    if against is None:
        return 0
    worse = find_regressions(against, rows, model=model, machine=describe_machine(), tolerance=tolerance)
    for regression in worse:
        sys.stderr.write(f"deepseek: {regression}\n")
    return 1 if worse else 0


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _whole_number(word: str) -> int:
    from deepseek.core.errors import ConfigError

    if not word.isdecimal():
        raise ConfigError(f"{word!r} in --batch-sizes is no whole number; write them as 1,16")
    return int(word)


def _show(model: str, rows: tuple[Row, ...]) -> None:
    """A table for each batch size, and below it what its rows have to say."""
    from deepseek.cli.screen.tables import show_table

    header = ("", "backend", "precision", "latency", "p95", "per second", "memory", "agrees", "cosine", "accuracy")
    for size in dict.fromkeys(row.batch_size for row in rows):
        shown = [row for row in rows if row.batch_size == size]
        show_table(f"{model}, batch {size}", header, [_cells(row) for row in shown])
        for row in shown:
            if row.note:
                sys.stdout.write(f"{row.name}: {row.note}\n")


def _cells(row: Row) -> tuple[str, ...]:
    from deepseek.core.units import format_bytes

    return (
        row.name,
        row.backend,
        row.precision,
        _number(row.latency_ms, "{:.2f} ms"),
        _number(row.latency_p95_ms, "{:.2f} ms"),
        _number(row.throughput_per_s, "{:.1f}"),
        "-" if row.memory_bytes is None else format_bytes(row.memory_bytes),
        _number(row.agreement, "{:.1%}"),
        _number(row.cosine, "{:.4f}"),
        _number(row.accuracy, "{:.2%}"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
