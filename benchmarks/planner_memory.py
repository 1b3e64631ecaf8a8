"""Memory by item is what torch holds: median error at most 5 %, never more than 3 % too low.

Sides: small decoders with recomputation on and off, several widths, depths, vocabularies and micro-batches, each run
for real on this processor while every storage that torch makes is counted. A driver's context, communication buffers
and the allocator's gaps are no tensors, so they are left out on both sides. Rates are predicted over measured bytes.
"""

from __future__ import annotations

import itertools
import statistics

from benchmarks.measuring import Bar, Row, parse_arguments, report
from deepseek.distributed.plan import Plan
from deepseek.planning.models.model_shape import ModelShape
from tests.planning.plain_decoder import measure_step
from tests.planning.test_planner_memory import HELD, predict_items

LAYERS, WIDTHS, VOCABULARIES, MICRO_BATCHES = (2, 6), (128, 384), (512, 4096), (1, 4)


def main() -> None:
    """Measure all cases and report."""
    arguments = parse_arguments(__doc__ or "")
    cases = list(itertools.product(LAYERS, WIDTHS, VOCABULARIES, MICRO_BATCHES, (False, True)))
    rows = [compare(*case) for case in (cases[::5] if arguments.quick else cases)]
    ratios = [row.median for row in rows if row.median is not None]
    bars = [
        Bar("median error", statistics.median(abs(ratio - 1) for ratio in ratios), 0.05, at_least=False),
        Bar("lowest predicted / measured", min(ratios), 0.97),
    ]
    report("planner_memory", "predicted / measured", rows, bars, arguments)


def compare(layers: int, width: int, vocabulary: int, micro_batch: int, is_recomputing: bool) -> Row:
    """Predicted over measured peak bytes of one case."""
    shape = ModelShape(
        layers=layers, hidden=width, heads=width // 64, ffn=3 * width, vocabulary=vocabulary, sequence=256
    )
    measured, _ = measure_step(shape, micro_batch, is_recomputing=is_recomputing)
    again = "full" if is_recomputing else "none"
    items = predict_items(shape, Plan(micro_batch_size=micro_batch, recomputation=again), 2 * micro_batch)
    ratio = sum(items[name] for name in HELD) / measured
    name = f"{layers} layers of {width}, vocabulary {vocabulary}, micro-batch {micro_batch}, {again} recomputation"
    return Row(name, ratio, ratio, ratio, f"{measured / 1e6:.0f} MB held")


if __name__ == "__main__":
    main()
