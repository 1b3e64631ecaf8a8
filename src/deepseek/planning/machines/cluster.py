"""The machines a plan runs on: accelerators, the links between them, and how many sit together.

Three link classes matter: inside a device's memory (bandwidth only), inside the scale-up domain (NVLink, xGMI; a
node, or a rack where the switch spans one), and between domains (one network card's share per device). Each class is
a latency `alpha_s` and a bandwidth, the two numbers of the alpha-beta model (Hockney 1994).

Datasheet numbers of named accelerators are in `hardware.csv` with their sources; a measured machine is described with
`Accelerator(...)` and `LinkClass(...)` directly. What fraction of a datasheet number is reached is not said here but in
`constants.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.constants import Constants, get_constants


@dataclass(frozen=True)
class Accelerator:
    """Datasheet of one device: dense peaks in FLOP/s by precision, memory in bytes, links in bytes/s per direction.

    `topology` says how the scale-up links reach the neighbours: all through a `switch`, in `pairs` (every two devices
    have a link of their own), or as the eight-device hybrid cube `mesh` of DGX-1. `achievable_fraction` is the best
    share of its 16 bit peak that anybody measured on the device itself, any matrix size. `shares` are the constants of
    this very device where they were measured on it; without them, those of its family count. `is_host` says that the
    processor that issues kernels also runs them, so that issuing takes its time and hides behind nothing.
    """

    name: str
    memory_bytes: float
    memory_bandwidth_bytes_per_s: float
    peak_flops: Mapping[str, float]
    scale_up: LinkClass
    network: LinkClass
    family: str = "other"
    scale_up_size: int = 8
    topology: str = "switch"
    processors: int = 108
    achievable_fraction: float | None = None
    power_w: float = 0.0
    shares: Constants | None = None
    is_host: bool = False

    @property
    def constants(self) -> Constants:
        """The shares of its numbers that the device reaches: as measured on it, or on others of its family."""
        return self.shares or get_constants(self.family)

    def get_peak_flops(self, precision: str) -> float:
        """Return dense peak for matrices in `precision`; a precision the device lacks runs at its 16 bit rate.

        One that was measured in 32 bits alone, as local ranks are that train in them, has that rate.
        """
        rates = (self.peak_flops.get(name) for name in (precision, "bf16", "fp16"))
        return next((rate for rate in rates if rate), 0.0) or self.peak_flops["fp32"]


@dataclass(frozen=True)
class Node:
    """`gpus` equal accelerators in one box."""

    accelerator: Accelerator
    gpus: int


@dataclass(frozen=True)
class Cluster:
    """Boxes of accelerators and the links between them; boxes may differ in device and in number of devices.

    `network` is one device's share between scale-up domains. `links` and `domain_size` describe the domains where they
    are not what the accelerators' datasheets say. `num_cores` are processor cores that all devices share where these
    are ranks of one host: speeds of such a device are those that it has while all others compute as well, and a rank
    that waits leaves its cores to others. 0: every device has its own.

    >>> Cluster.of("H100-SXM-80GB", nodes=4).num_devices
    32
    >>> Cluster.of("H100-SXM-80GB", nodes=2).join(Cluster.of("A100-SXM-80GB", nodes=1)).is_uniform
    False
    """

    nodes: tuple[Node, ...]
    network: LinkClass
    links: LinkClass | None = None
    domain_size: int = 0
    num_cores: int = 0

    def __post_init__(self) -> None:
        """A cluster without devices runs nothing."""
        if not self.nodes or any(node.gpus < 1 for node in self.nodes):
            raise ConfigError("a cluster needs at least one node with at least one device")
        if self.num_cores < 0:
            raise ConfigError(f"num_cores={self.num_cores} is no number of cores; give 0 where devices share none")

    @classmethod
    def of(
        cls,
        accelerator: str | Accelerator,
        *,
        nodes: int = 1,
        gpus_per_node: int = 8,
        network_gbit_per_s: float | None = None,
    ) -> Cluster:
        """Build `nodes` equal boxes; `network_gbit_per_s` is one device's share of the network cards."""
        for name, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a positive whole number; give how many there are")
        device = get_accelerator(accelerator) if isinstance(accelerator, str) else accelerator
        network = device.network
        if network_gbit_per_s is not None:
            network = replace(network, bandwidth_bytes_per_s=network_gbit_per_s * 1e9 / 8)
        return cls((Node(device, gpus_per_node),) * nodes, network)

    def join(self, other: Cluster) -> Cluster:
        """Join both clusters behind the slower of their networks."""
        network = min(self.network, other.network, key=lambda link: link.bandwidth_bytes_per_s)
        return Cluster((*self.nodes, *other.nodes), network)

    @property
    def scale_up(self) -> LinkClass:
        """The links inside a scale-up domain: those given, or those of the slowest accelerator."""
        return self.links or min(
            (node.accelerator.scale_up for node in self.nodes), key=lambda link: link.bandwidth_bytes_per_s
        )

    @property
    def scale_up_size(self) -> int:
        """Devices of one scale-up domain: as given, or a box, or the rack that one switch spans."""
        spanned = min(node.accelerator.scale_up_size for node in self.nodes)
        size = self.domain_size or (spanned if spanned > 8 else self.gpus_per_node)
        return min(size, self.num_devices)

    @property
    def num_devices(self) -> int:
        """Devices in all boxes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def is_uniform(self) -> bool:
        """Whether all boxes are equal."""
        return len(set(map(_describe, self.nodes))) == 1

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        """One entry per device, in rank order."""
        return tuple(node.accelerator for node in self.nodes for _ in range(node.gpus))

    @property
    def gpus_per_node(self) -> int:
        """Devices of the smallest box: what a group may count on."""
        return min(node.gpus for node in self.nodes)


def _describe(node: Node) -> tuple[str, int]:
    return (node.accelerator.name, node.gpus)


# One step of a collective: 64 bytes take 3.3 us over NVLink and 2.8 to 5.6 us over the network (arXiv:2505.09343),
# and the receiving kernel polls about as long again where a network card is between.
_LATENCY_S = {"scale_up": 4e-6, "network": 8e-6}
_PRECISION_COLUMNS = {
    "fp32": "fp32_tflops",
    "bf16": "bf16_tflops",
    "fp16": "fp16_tflops",
    "fp8": "fp8_tflops",
    "mxfp8": "fp8_tflops",
    "fp4": "fp4_tflops",
}


@cache
def load_accelerators() -> dict[str, Accelerator]:
    """Return every named accelerator of `hardware.csv`."""
    text = files("deepseek.planning.machines").joinpath("hardware.csv").read_text(encoding="utf-8")
    return {row["name"]: _read_row(row) for row in csv.DictReader(text.splitlines())}


def _read_row(row: Mapping[str, str]) -> Accelerator:
    peaks = {name: float(row[column]) * 1e12 for name, column in _PRECISION_COLUMNS.items() if row[column]}
    return Accelerator(
        name=row["name"],
        memory_bytes=_usable_bytes(float(row["memory_gb"])),
        memory_bandwidth_bytes_per_s=float(row["memory_gbytes_per_s"]) * 1e9,
        peak_flops=peaks,
        scale_up=LinkClass(_LATENCY_S["scale_up"], float(row["scale_up_gbytes_per_s"] or 1) * 1e9),
        network=LinkClass(_LATENCY_S["network"], float(row["network_gbit_per_s"]) * 1e9 / 8),
        family=row["family"],
        scale_up_size=int(row["scale_up_size"]),
        topology=row["topology"],
        processors=int(row["processors"]),
        achievable_fraction=_read_achievable(row),
        power_w=float(row["power_w"] or 0),
    )


def _read_achievable(row: Mapping[str, str]) -> float | None:
    measured, peak = row["measured_bf16_tflops"], row["bf16_tflops"]
    return float(measured) / float(peak) if measured and peak else None


def _usable_bytes(memory_gb: float) -> float:
    """Read a datasheet's memory: it prints the number of GiB with the letters GB up to 96, and decimal GB above."""
    return memory_gb * (2**30 if memory_gb <= 96 else 1e9)


def get_accelerator(name: str) -> Accelerator:
    """Return the accelerator called `name`, upper or lower case; an unknown name lists the nearest known ones.

    >>> get_accelerator("a100-sxm-80gb").peak_flops["bf16"]
    312000000000000.0
    """
    known = {known_name.lower(): known_name for known_name in load_accelerators()}
    if name.lower() not in known:
        raise ConfigError(explain_unknown("accelerator", name, load_accelerators()))
    return load_accelerators()[known[name.lower()]]
