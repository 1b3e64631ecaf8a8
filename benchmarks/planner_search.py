"""The exact search: a million candidates in under 10 s on one core.

Sides: models from 8 billion to 1.75 trillion parameters on 64 to 16,384 devices. Each is searched whole; the rate
counts every candidate that the space holds after divisibility.
"""

from __future__ import annotations

import time

from benchmarks.measuring import Bar, Row, Side, measure, parse_arguments, report
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape, get_model_shape
from deepseek.planning.scaling import GPT_1750B
from deepseek.planning.search.planner import plan

NUM_CANDIDATES, GOAL_S = 1_000_000, 10.0
CASES = {
    "Llama3-8B on 64": (get_model_shape("Llama3-8B"), 8, 512),
    "GPT-1.75T on 1,024": (GPT_1750B, 128, 2048),
    "Llama3.1-405B on 16,384": (get_model_shape("Llama3.1-405B"), 2048, 16384),
    "DeepSeek-V3 on 16,384": (get_model_shape("DeepSeek-V3"), 2048, 16384),
}


def main() -> None:
    """Search all cases and report."""
    arguments = parse_arguments(__doc__ or "")
    sides = [Side(name, lambda case=case: rate(*case)) for name, case in CASES.items()]  # type: ignore[misc]
    rows = measure(sides, num_rounds=1 if arguments.quick else 5)
    report("planner_search", "candidates/s", rows, [set_bar(row) for row in rows], arguments)


def set_bar(row: Row) -> Bar:
    """Return the goal for one case: the seconds that a million candidates take at its rate."""
    assert row.median is not None
    return Bar(f"seconds for a million candidates, {row.name}", NUM_CANDIDATES / row.median, GOAL_S, at_least=False)


def rate(model: ModelShape, nodes: int, global_batch: int) -> float:
    """Return the candidates per second of one search."""
    cluster = Cluster.of("H100-SXM-80GB", nodes=nodes)
    began_s = time.perf_counter()
    found = plan(model, cluster, global_batch=global_batch)
    return found.num_candidates / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
