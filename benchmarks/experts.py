"""Experts: balancing by load factors uses at least 1.37 times the room of plain top-k routing on skewed tokens.

Each expert has room for the average load. Tokens come from groups whose sizes follow Zipf's law and which share a
direction, so that a gate of random weights likes few experts; the sides see the same fresh batches. Utilization is the
share of all room that is taken, after as many batches as a balancing bias needs to settle. Nothing is timed.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from benchmarks.measuring import Bar, Row, parse_arguments, ratio, report
from deepseek.nn.moe import MoERouter, SwiGLUExperts

HIDDEN_SIZE, NUM_EXPERTS, TOP_K, NUM_TOKENS, NUM_GROUPS = 32, 16, 2, 512, 64
NUM_SETTLING, NUM_MEASURED = 100, 10
SIDES: dict[str, dict[str, float]] = {
    "plain top-k": {},
    "balanced by load factor": {"balance_rate": 0.005},
    "balanced, progressive": {"balance_rate": 0.005, "num_candidates": 8},
}


def draw_tokens(centers_GD: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a batch whose groups have sizes by Zipf's law."""
    shares_G = 1 / torch.arange(1, NUM_GROUPS + 1)
    groups_N = torch.multinomial(shares_G, NUM_TOKENS, replacement=True, generator=generator)
    return centers_GD[groups_N] + 0.5 * torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator)


def measure_side(options: dict[str, float], seed: int) -> tuple[float, dict[str, float]]:
    """Return the utilization of one side, and what it says of its last batch."""
    torch.manual_seed(seed)
    experts = SwiGLUExperts(NUM_EXPERTS, HIDDEN_SIZE, 8)
    router = MoERouter(experts, TOP_K, hidden_size=HIDDEN_SIZE, capacity_factor=1.0, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    centers_GD = torch.randn(NUM_GROUPS, HIDDEN_SIZE, generator=generator)
    centers_GD = centers_GD + torch.randn(HIDDEN_SIZE, generator=generator)
    shares = []
    with torch.no_grad():
        for batch in range(NUM_SETTLING + NUM_MEASURED):
            router(draw_tokens(centers_GD, generator))
            if batch >= NUM_SETTLING:
                shares.append(1 - float(router.dropped_share))
    return statistics.mean(shares), router.measure_balance()


def main() -> None:
    """Measure all sides on the same tokens."""
    arguments = parse_arguments(__doc__ or "")
    seeds = range(1 if arguments.quick else 3)
    rows = []
    for name, options in SIDES.items():
        found = [measure_side(options, seed) for seed in seeds]
        values = [utilization for utilization, _ in found]
        gini, idle = (statistics.mean(balance[key] for _, balance in found) for key in ("gini", "idle"))
        note = f"Gini {gini:.2f}, idle experts {idle:.0%}"
        rows.append(Row(name, statistics.median(values), min(values), max(values), note))
    gain = ratio(rows, "balanced by load factor", "plain top-k")
    bars = [Bar("utilization, balanced over plain", gain, 1.37)]
    report("experts", "share of room taken", rows, bars, arguments)


if __name__ == "__main__":
    main()
