"""Training in parallel: at least 0.97x the steps of DDP, FSDP2 and Fabric, 1.15x over slow links, twice the sequence.

    python -m benchmarks.parallel                  all sections
    python -m benchmarks.parallel local            2 and 4 ranks of this machine: data, ZeRO 3, tensor, pipeline
    python -m benchmarks.parallel links            the same model on 2 hosts with links of 200 Mbit/s (needs root)
    python -m benchmarks.parallel memory           the longest sequence under a budget of resident memory
    python -m benchmarks.parallel --quick

`local` trains one decoder under `ds.parallelize` and under plain torch, Accelerate and Lightning Fabric, in the same
processes, from the same weights, on the same rows; sides take turns. `links` does so on hosts of `shaped_hosts.py`,
where our gradients and shards travel by the algorithms of `DeepSeekComm`. The losses of all sides are compared: a side
that skipped its work would be fast.

`memory` trains a BERT of BERT-large's proportions (24 layers, heads of 64, 4x wide feed-forward) at half its width, so
that two ranks and the plain side fit into a machine of 16 GB. The budget is what the fullest rank of plain data
parallelism takes at 1024 tokens; ZeRO 3 with activation checkpointing has to take 2048 within it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.measuring import Bar, Row, add_options, report
from benchmarks.parallel_ranks import FAMILIES, OURS
from benchmarks.rank_processes import place_ranks, run_ranks
from benchmarks.shaped_hosts import Host, explain_absence, shaped_hosts

SECTIONS = ("local", "links", "memory")
WORLD_SIZES = (2, 4)
LEAST_RATIO, LEAST_RATIO_OVER_LINKS = 0.97, 1.15
LARGEST_LOSS_DIFFERENCE = 1e-3
NUM_HOSTS, RANKS_PER_HOST = 2, 2
PLACEMENTS = ("contiguous", "dealt out")
LINK_FAMILIES = ("data parallel", "ZeRO 3")
MODEL = {
    "vocab_size": 2048,
    "num_layers": 4,
    "hidden_size": 256,
    "num_heads": 4,
    "num_kv_heads": 4,
    "ffn_size": 768,
    "max_length": 128,
    "tie_embeddings": False,
}
QUICK_MODEL = MODEL | {"vocab_size": 512, "num_layers": 2, "hidden_size": 64, "ffn_size": 128, "max_length": 32}
NUM_ROWS = 8
MICRO_BATCHES = 4
WIDTHS = {True: 256, False: 512}  # of the BERT, quick and not
LENGTH, MEMORY_RANKS = 1024, 2
BERT_LARGE_WIDTH, BERT_VOCABULARY, BERT_LAYERS, HEAD_SIZE = 1024, 30522, 24, 64


def main() -> None:
    """Run the sections and report."""
    arguments = parse_arguments()
    rows: list[Row] = []
    bars: list[Bar] = []
    for section in arguments.sections or SECTIONS:
        found_rows, found_bars = RUNS[section](arguments)
        rows += found_rows
        bars += found_bars
    report("parallel", "steps/s, or MiB of the fullest rank", rows, bars, arguments)


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none is named")
    add_options(parser)
    parser.add_argument("--rate-mbit", type=float, default=200.0, help="rate of each host's link")
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"{min(unknown)!r} is no section; choose from {', '.join(SECTIONS)}")
    return arguments


def run_local(arguments: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Time every family on ranks of this machine."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for world_size in WORLD_SIZES[:1] if arguments.quick else WORLD_SIZES:
        job = describe_job(list(FAMILIES), has_comm=False, is_quick=arguments.quick, num_rounds=9, num_steps=3)
        found = run_ranks("benchmarks.parallel_ranks", [None] * world_size, job)
        print(f"measured {world_size} ranks", file=sys.stderr, flush=True)
        for family, result in found.items():
            label = f"{world_size} ranks, {family}"
            rows += list_rows(label, result)
            bars += list_bars(label, result, LEAST_RATIO)
    return rows, bars


def run_links(arguments: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Time data parallelism over shaped links; a row says so where there can be none."""
    absence = explain_absence()
    if absence is not None:
        return [Row("over links", None, None, None, f"skipped: {absence}")], []
    rows: list[Row] = []
    bars: list[Bar] = []
    with shaped_hosts(NUM_HOSTS, arguments.rate_mbit * 1e6 / 8) as hosts:
        for placement in PLACEMENTS:
            chosen: list[Host | None] = [hosts[host] for host in place_ranks(NUM_HOSTS, RANKS_PER_HOST, placement)]
            job = describe_job(LINK_FAMILIES, has_comm=True, is_quick=arguments.quick, num_rounds=5, num_steps=1)
            found = run_ranks("benchmarks.parallel_ranks", chosen, job)
            print(f"measured {placement} ranks over links", file=sys.stderr, flush=True)
            for family, result in found.items():
                label = f"{NUM_HOSTS}x{RANKS_PER_HOST} over {arguments.rate_mbit:g} Mbit/s, {placement}, {family}"
                rows += list_rows(label, result)
                bars += list_bars(label, result, LEAST_RATIO_OVER_LINKS)
    return rows, bars


def describe_job(
    families: Sequence[str], *, has_comm: bool, is_quick: bool, num_rounds: int, num_steps: int
) -> dict[str, Any]:
    """Return what the ranks are to do."""
    return {
        "kind": "time",
        "families": list(families),
        "model": QUICK_MODEL if is_quick else MODEL,
        "rows": NUM_ROWS,
        "micro_batches": MICRO_BATCHES,
        "has_comm": has_comm,
        "rounds": 1 if is_quick else num_rounds,
        "steps": num_steps,
    }


def list_rows(label: str, result: dict[str, Any]) -> list[Row]:
    """Return a row for each side: steps per second."""
    rows = []
    for side, seconds in result["seconds"].items():
        rates = [1 / value for value in seconds]
        rows.append(Row(f"{label}: {side}", statistics.median(rates), min(rates), max(rates), ""))
    return rows + [Row(f"{label}: {side}", None, None, None, note) for side, note in result["absent"].items()]


def list_bars(label: str, result: dict[str, Any], goal: float) -> list[Bar]:
    """Hold our side against each of the others, round by round, and the losses of all against ours."""
    seconds, losses = result["seconds"], result["losses"]
    peers = [side for side in seconds if side != OURS]
    bars = [
        Bar(
            f"{label}: ours / {peer}",
            statistics.median(theirs / ours for theirs, ours in zip(seconds[peer], seconds[OURS], strict=True)),
            goal,
        )
        for peer in peers
    ]
    pairs = [pair for peer in peers for pair in zip(losses[peer], losses[OURS], strict=True)]
    difference = max(abs(theirs / ours - 1) for theirs, ours in pairs)
    return [
        *bars,
        Bar(f"{label}: largest difference of the losses", difference, LARGEST_LOSS_DIFFERENCE, at_least=False),
    ]


def run_memory(arguments: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Measure resident memory by length, plain and with ZeRO 3 and checkpointing."""
    width = WIDTHS[arguments.quick]
    model = {
        "vocab_size": BERT_VOCABULARY * width // BERT_LARGE_WIDTH,
        "hidden_size": width,
        "num_hidden_layers": BERT_LAYERS,
        "num_attention_heads": width // HEAD_SIZE,
        "intermediate_size": 4 * width,
    }
    rows: list[Row] = []
    found: dict[tuple[int, int], float] = {}
    for zero_stage, length in ((0, LENGTH), (3, LENGTH), (0, 2 * LENGTH), (3, 2 * LENGTH)):
        job = {"kind": "memory", "model": model, "length": length, "zero_stage": zero_stage}
        job["is_checkpointed"] = zero_stage > 0
        result = run_ranks("benchmarks.parallel_ranks", [None] * MEMORY_RANKS, job)
        found[zero_stage, length] = mib = result["bytes"] / 2**20
        kind = "ZeRO 3 with checkpointing" if zero_stage else "plain data parallelism"
        rows.append(Row(f"BERT of width {width}, {length} tokens: {kind}", mib, mib, mib, "MiB of the fullest rank"))
        print(f"measured {kind} at {length} tokens", file=sys.stderr, flush=True)
    budget = found[0, LENGTH]
    bars = [
        Bar(f"memory of {2 * LENGTH} tokens with ZeRO 3 and checkpointing / of {LENGTH} without",
            found[3, 2 * LENGTH] / budget, 1.0, at_least=False),
        Bar(f"memory of {2 * LENGTH} tokens without / of {LENGTH} without", found[0, 2 * LENGTH] / budget, 1.0),
    ]  # fmt: skip
    return rows, bars


RUNS = {"local": run_local, "links": run_links, "memory": run_memory}

if __name__ == "__main__":
    main()
