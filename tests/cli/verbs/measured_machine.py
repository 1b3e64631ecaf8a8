"""A machine as if it had been measured, for tests of what is planned on it."""

from __future__ import annotations

from pathlib import Path

from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.machines.constants import get_constants
from deepseek.planning.machines.measurement import describe_surroundings
from deepseek.planning.naming import save_cluster


def save_machine(folder: Path) -> None:
    """Keep a small processor as what was measured of this machine."""
    link = LinkClass(1e-5, 1e9)
    device = Accelerator(
        "a box", 16e9, 2e10, {"fp32": 5e10, "bf16": 1e11}, link, link, scale_up_size=1, processors=2,
        shares=get_constants("other"),
    )  # fmt: skip
    save_cluster(Cluster((Node(device, 1),), link), folder / "cluster.json", measured_on=describe_surroundings())
