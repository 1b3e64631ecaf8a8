"""`deepseek plan measure`: how fast this machine computes and exchanges messages, kept for later plans."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek.planning.machines.cluster import Cluster
    from deepseek.planning.machines.measured_collectives import MeasuredCollective


def plan_measure(*, out: Path | None = None, collectives: int | None = None, json: bool = False) -> None:
    """Measure this machine: matmuls, attention, elementwise kernels, memory, and messages between two processes.

    The result is kept, and `deepseek plan MODEL` uses it. Measure on a quiet machine.

    Example: deepseek plan measure --collectives 4

    Parameters
    ----------
    out
        File for the result; without it the one that later plans read.
    collectives
        Also run every collective between so many processes, beside what its messages should take.
    json
        Print JSON.
    """
    from deepseek.cli.screen.plans import print_json, show_cluster, show_collectives
    from deepseek.cli.screen.tables import working
    from deepseek.planning.machines.measured_collectives import measure_collectives
    from deepseek.planning.machines.measurement import default_file
    from deepseek.planning.naming import cluster_to_dict

    cluster = measure_to(out or default_file())
    measured: tuple[MeasuredCollective, ...] = ()
    if collectives is not None:
        with working("running collectives"):
            measured = measure_collectives(collectives, cluster.scale_up)
    if json:
        print_json(cluster_to_dict(cluster) | {"collectives": [row.to_dict() for row in measured]})
        return
    show_cluster(cluster)
    if measured:
        show_collectives(measured)


def find_machine() -> Cluster:
    """Find this machine as it was measured before, or measure it now."""
    from deepseek.planning.machines.measurement import default_file, describe_surroundings
    from deepseek.planning.naming import load_measured

    path = default_file()
    if not path.exists():
        return measure_to(path)
    kept = load_measured(path, describe_surroundings())
    if isinstance(kept, str):
        print(f"{kept}; measuring again", file=sys.stderr)
        return measure_to(path)
    return kept


def measure_to(path: Path) -> Cluster:
    """Measure this machine and keep the result in `path`."""
    from deepseek.cli.screen.tables import working
    from deepseek.planning.machines.measurement import build_cluster, describe_surroundings, measure_machine
    from deepseek.planning.naming import save_cluster

    with working("measuring this machine"):
        cluster = build_cluster(measure_machine())
    save_cluster(cluster, path, measured_on=describe_surroundings())
    print(f"measured this machine, kept in {path}", file=sys.stderr)
    return cluster
