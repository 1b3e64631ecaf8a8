"""Collectives by hosts over shaped links: at least twice gloo's own all-reduce where ranks are dealt out over hosts.

    python -m benchmarks.collectives                     2x2 and 4x2 ranks, 1 KiB to 64 MiB, 200 Mbit/s
    python -m benchmarks.collectives --quick             2x2 ranks, few sizes, one round
    python -m benchmarks.collectives --hosts 4 --rate-mbit 100 --rounds 5

Hosts are network namespaces (`shaped_hosts.py`; needs root, and says so where it cannot run). Ranks are placed host by
host ("contiguous") or in turns over the hosts ("dealt out", as many launchers do). Bytes over the slow links are read
from the cards' counters and held against the formula; a step-accurate simulation of the same message lists is held
against the measured seconds before it says anything about 128 nodes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Bar, print_bars, write_json
from benchmarks.rank_processes import place_ranks, run_ranks
from benchmarks.shaped_hosts import explain_absence, shaped_hosts
from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.messages import Step, cut
from deepseek.distributed.reduction_algorithms import count_slices
from deepseek.distributed.topology import LinkClass, RankTopology

SIZES = tuple(1 << bits for bits in (10, 14, 18, 20, 22, 24, 26))
QUICK_SIZES = (1 << 14, 1 << 22)
RANKS_PER_HOST = 2
LARGE_BYTES = 4 << 20  # from here on the bars on speed hold
COUNTED_BYTES = 1 << 20  # below, headers and acknowledgements are what the counters see
# 128 nodes of 8 accelerators: links of the class of NVLink 4 and of one 400 Gbit/s card for each accelerator.
NUM_NODES, PER_NODE = 128, 8
SCALE_UP, NETWORK = LinkClass(2e-6, 300e9), LinkClass(4e-6, 45e9)
NODE_SIZES = (1 << 20, 1 << 24)


def main() -> None:
    """Measure, print the tables and the bars, and write them where the arguments say."""
    arguments = parse_arguments()
    absence = explain_absence()
    if absence is not None:
        print(f"skipped: {absence}")
        if arguments.json:
            write_json(arguments.json, "collectives", "s", [{"note": f"skipped: {absence}"}], [])
        return
    rows: list[dict[str, Any]] = []
    extras: dict[str, Any] = {}
    for num_hosts in arguments.hosts:
        measure_hosts(num_hosts, arguments, rows, extras)
    extras["simulated_128_nodes"] = [simulate_nodes(size) for size in NODE_SIZES]
    bars = judge(rows, extras)
    show(rows, extras)
    print_bars(bars)
    if arguments.json:
        write_json(arguments.json, "collectives", "s", rows, bars, **extras)


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the result to this file as JSON")
    parser.add_argument("--quick", action="store_true", help="few sizes and one round, to see that it runs")
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4], help="numbers of hosts, of 2 ranks each")
    parser.add_argument("--rate-mbit", type=float, default=200.0, help="rate of each host's link")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count, in which all sides take turns")
    parser.add_argument("--largest-mib", type=int, default=64, help="leave out larger buffers")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.hosts, arguments.rounds = [2], 1
    return arguments


def measure_hosts(
    num_hosts: int, arguments: argparse.Namespace, rows: list[dict[str, Any]], extras: dict[str, Any]
) -> None:
    """Measure both placements on that many hosts, and on one of them what does not depend on it."""
    rate = arguments.rate_mbit * 1e6 / 8
    sizes = [size for size in (QUICK_SIZES if arguments.quick else SIZES) if size <= arguments.largest_mib << 20]
    with shaped_hosts(num_hosts, rate) as hosts:
        for placement in ("contiguous", "dealt out"):
            names = place_ranks(num_hosts, RANKS_PER_HOST, placement)
            parts = ["links", "all_reduce"]
            if placement == "contiguous":
                parts += ["all_to_all", "overlap", "ledger"]
            job = {
                "parts": parts,
                "sizes": sizes,
                "rounds": arguments.rounds,
                "tokens": 4096 if not arguments.quick else 512,
                "width": 512,
                "batch": 2048 if not arguments.quick else 256,
            }
            found = run_ranks("benchmarks.collective_ranks", [hosts[name] for name in names], job)
            world = f"{num_hosts}x{RANKS_PER_HOST}"
            for row in found["all_reduce"]:
                rows += describe_row(world, placement, names, row, found["links"], rate)
            for part in parts[2:]:
                extras.setdefault(part, {})[world] = found[part]
            print(f"measured {world}, {placement}", file=sys.stderr, flush=True)


def describe_row(
    world: str,
    placement: str,
    hosts: Sequence[int],
    row: dict[str, Any],
    links: dict[str, list[tuple[int, float]]],
    rate: float,
) -> list[dict[str, Any]]:
    """Return a row for each side: medians, bytes beside the formula, the link's bound, and the simulation."""
    described = []
    for side, seconds in row["seconds"].items():
        ran = {"auto": row["chosen"], "gloo": "flat"}.get(side, side)
        slices, ranks = list_slices(ran, hosts, row["bytes"] // 4)
        leaving = count_leaving([step for steps in slices for step in steps], ranks)
        wire = statistics.median(row["wire_bytes"][side])
        median_s = statistics.median(seconds)
        described.append(
            {
                "world": world,
                "placement": placement,
                "bytes": row["bytes"],
                "side": side,
                "ran": ran,
                "median_s": median_s,
                "lowest_s": min(seconds),
                "highest_s": max(seconds),
                "against_gloo": statistics.median(
                    theirs / ours for theirs, ours in zip(row["seconds"]["gloo"], seconds, strict=True)
                ),
                "wire_bytes": wire,
                "formula_bytes": 4 * sum(leaving.values()),
                "bound_share": 4 * max(leaving.values()) / rate / median_s,
                "simulated_s": simulate(slices, ranks, 4, *fit_links(links))
                if ran in ("ring", "hierarchical")
                else None,
            }
        )
    return described


def list_slices(algorithm: str, hosts: Sequence[int], num_elements: int) -> tuple[list[tuple[Step, ...]], list[int]]:
    """Return the messages of an all-reduce by slice, and the host of each number in them.

    Gloo's own is a ring in rank order.
    """
    topology = RankTopology.of(hosts)
    order = range(len(hosts)) if algorithm == "flat" else topology.placement
    name = "ring" if algorithm == "flat" else algorithm
    domain = topology.domain_size if algorithm == "hierarchical" else 1
    parts = cut(num_elements, 1 if algorithm == "flat" else count_slices(4 * num_elements))
    slices = [COLLECTIVES[f"{name}_all_reduce"](len(hosts), stop - start, domain) for start, stop in parts]
    return slices, [topology.hosts[rank] for rank in order]


def count_leaving(steps: Sequence[Step], hosts: Sequence[int]) -> dict[int, int]:
    """Count the elements that leave each host."""
    counts: dict[int, int] = dict.fromkeys(hosts, 0)
    for message in (message for step in steps for message in step):
        if hosts[message.source] != hosts[message.target]:
            counts[hosts[message.source]] += message.num_elements
    return counts


def fit_links(links: dict[str, list[tuple[int, float]]]) -> tuple[LinkClass, LinkClass]:
    """Return latency and bandwidth inside and across hosts: the shortest message, and the slope between the longest."""
    fitted = []
    for name in ("inside", "across"):
        (_, alpha_s), *_, (low, low_s), (high, high_s) = links[name]
        fitted.append(LinkClass(alpha_s, (high - low) / max(high_s - low_s, 1e-9)))
    return fitted[0], fitted[1]


def simulate(
    slices: Sequence[Sequence[Step]], hosts: Sequence[int], element_bytes: int, inside: LinkClass, across: LinkClass
) -> float:
    """Time slices that take turns, step by step.

    Messages that leave or reach one host in a step share its link, and a link carries one slice after the other. What a
    step takes besides its bytes is time of the processor, which all hosts of this machine share.
    """
    ready_s = [0.0] * len(slices)
    free_s: dict[tuple[str, int], float] = defaultdict(float)
    processor_s = 0.0
    for index in range(max(len(steps) for steps in slices)):
        for number, steps in enumerate(slices):
            if index >= len(steps):
                continue
            arrived_s, start_s = ready_s[number], 0.0
            for (direction, host), num_bytes in share_links(steps[index], hosts, element_bytes).items():
                link = inside if direction == "inside" else across
                begin_s = max(ready_s[number], free_s[direction, host])
                free_s[direction, host] = begin_s + num_bytes / link.bandwidth_bytes_per_s
                arrived_s, start_s = max(arrived_s, free_s[direction, host]), max(start_s, link.alpha_s)
            processor_s = ready_s[number] = max(arrived_s, processor_s) + start_s
    return max(ready_s)


def share_links(step: Step, hosts: Sequence[int], element_bytes: int) -> dict[tuple[str, int], int]:
    """Return the bytes of a step over each link: inside a host, out of it and into it."""
    shared: dict[tuple[str, int], int] = defaultdict(int)
    for message in step:
        source, target = hosts[message.source], hosts[message.target]
        num_bytes = message.num_elements * element_bytes
        if source == target:
            shared["inside", source] += num_bytes
        else:
            shared["out", source] += num_bytes
            shared["in", target] += num_bytes
    return shared


def simulate_nodes(num_bytes: int) -> dict[str, float]:
    """Seconds of both all-reduces on 128 nodes of 8; each accelerator has a card of its own, so nothing is shared."""
    world = NUM_NODES * PER_NODE
    seconds = {}
    for name, domain in (("ring", 1), ("hierarchical", PER_NODE)):
        total_s = 0.0
        for step in COLLECTIVES[f"{name}_all_reduce"](world, num_bytes // 2, domain):
            total_s += max(
                (SCALE_UP if message.source // PER_NODE == message.target // PER_NODE else NETWORK).send_s(
                    message.num_elements * 2
                )
                for message in step
            )
        seconds[name] = total_s
    return {"bytes": float(num_bytes), **seconds, "ratio": seconds["ring"] / seconds["hierarchical"]}


def judge(rows: Sequence[dict[str, Any]], extras: dict[str, Any]) -> list[Bar]:
    """Hold what was measured against the bars."""

    def select(**wanted: object) -> list[dict[str, Any]]:
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def worst(found: Sequence[dict[str, Any]], name: str) -> float | None:
        return min((row[name] for row in found), default=None)

    large = [row for row in rows if row["bytes"] >= LARGE_BYTES]
    autos = [row for row in large if row["side"] == "auto"]
    counted = [row for row in rows if row["bytes"] >= COUNTED_BYTES and row["side"] != "auto"]
    simulated = [row for row in rows if row["simulated_s"] is not None]
    widest = max((row["world"] for row in rows), default="")
    bars = [
        Bar(
            "largest difference of bytes over the links from the formula",
            max((abs(row["wire_bytes"] / row["formula_bytes"] - 1) for row in counted), default=None),
            0.03,
            at_least=False,
        ),
        *(
            Bar(f"auto against gloo, {widest}, {placement}, 4 MiB and up", worst(found, "against_gloo"), goal)
            for placement, goal in (("dealt out", 2.0), ("contiguous", 1.1))
            for found in [[row for row in autos if row["placement"] == placement and row["world"] == widest]]
        ),
        Bar("auto against gloo, worst of all", worst(select(side="auto"), "against_gloo"), 0.95),
        Bar(
            "share of the link's bound, hierarchical, 4 MiB and up",
            worst([row for row in large if row["side"] == "hierarchical"], "bound_share"),
            0.9,
        ),
        Bar(
            "median difference of the simulation from what was measured",
            statistics.median([abs(row["simulated_s"] / row["median_s"] - 1) for row in simulated])
            if simulated
            else None,
            0.1,
            at_least=False,
        ),
    ]
    for world, kinds in extras.get("all_to_all", {}).items():
        for kind, goal in (("own favorites", 0.42), ("one favorite", 0.0)):
            medians = {name: statistics.median(times) for name, times in kinds[kind].items()}
            saved = 1 - medians["uneven, ring"] / medians["padded, gloo"]
            bars.append(Bar(f"time saved by uneven ring all-to-all, {kind}, {world}", saved, goal))
    for world, found in extras.get("overlap", {}).items():
        medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
        bars.append(
            Bar(f"backward with overlap against without, {world}", medians["blocking"] / medians["overlapped"], 1.25)
        )
    for world, found in extras.get("ledger", {}).items():
        share = found["call_s"] / found["all_reduce_s"]
        bars.append(Bar(f"share of the ledger of a 1 MiB all-reduce, {world}", share, 0.01, at_least=False))
    return bars


def show(rows: Sequence[dict[str, Any]], extras: dict[str, Any]) -> None:
    """Print everything that was measured."""
    table = Table(title="all-reduce", title_justify="left")
    columns = (
        "world",
        "placement",
        "bytes",
        "side",
        "ran",
        "median ms",
        "against gloo",
        "wire/formula",
        "of bound",
        "simulated",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        simulated = row["simulated_s"]
        table.add_row(
            row["world"],
            row["placement"],
            str(row["bytes"]),
            row["side"],
            row["ran"],
            f"{row['median_s'] * 1e3:.2f}",
            f"{row['against_gloo']:.2f}",
            f"{row['wire_bytes'] / max(row['formula_bytes'], 1):.3f}",
            f"{row['bound_share']:.2f}",
            "-" if simulated is None else f"{simulated * 1e3:.2f}",
        )
    console = Console(width=140)
    console.print(table)
    for world, kinds in extras.get("all_to_all", {}).items():
        for kind, times in kinds.items():
            console.print(f"all-to-all, {kind}, {world}, ms: {list_medians(times)}")
    for world, found in extras.get("overlap", {}).items():
        console.print(
            f"backward, {world}, ms: {list_medians(found['seconds'])}; exposed {list_medians(found['exposed_s'])}"
        )
    for found in extras["simulated_128_nodes"]:
        console.print(
            f"simulated, {NUM_NODES} nodes of {PER_NODE}, {found['bytes'] / 2**20:g} MiB: ring "
            f"{found['ring'] * 1e3:.2f} ms, hierarchical {found['hierarchical'] * 1e3:.2f} ms ({found['ratio']:.1f}x)"
        )


def list_medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians in milliseconds."""
    return {name: round(statistics.median(times) * 1e3, 1) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
