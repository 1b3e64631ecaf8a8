"""Hosts of this machine for `benchmarks.collectives`: network namespaces on a bridge, with links of a given rate.

Each host is a namespace with a network card of its own (one end of a veth pair) and a host name of its own; the other
ends are ports of a bridge in one more namespace, the switch. `tc tbf` shapes both ends, so a host sends and receives at
the rate and not faster, while ranks inside a host talk over its loopback. Packets are 9,000 bytes, as in a cluster's
network. It needs root, `ip` and `tc`; everything is gone when the block ends, also when it ends by an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

MTU_BYTES = 9000
_BURST_BYTES = 32 * 1024


@dataclass(frozen=True)
class Host:
    """A namespace with its address."""

    name: str
    namespace: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on this host."""
        script = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", script, "sh", *command]


def explain_absence() -> str | None:
    """Say what is missing here for hosts, or `None`."""
    if os.geteuid() != 0:
        return "network namespaces need root: run it as root, or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    name = f"ds{os.getpid()}try"
    found = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if found.returncode:
        return f"no network namespace could be made here: {found.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextmanager
def shaped_hosts(num_hosts: int, rate_bytes_per_s: float) -> Iterator[list[Host]]:
    """Make hosts whose links carry `rate_bytes_per_s` in each direction, and remove them."""
    prefix = f"ds{os.getpid()}"
    switch = f"{prefix}switch"
    hosts = [Host(f"host{index}", f"{prefix}h{index}", f"10.77.0.{index + 1}") for index in range(num_hosts)]
    made: list[str] = []
    try:
        for namespace in (switch, *(host.namespace for host in hosts)):
            _run("ip", "netns", "add", namespace)
            made.append(namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "-n", switch, "link", "add", "bridge0", "mtu", str(MTU_BYTES), "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge0", "up")
        for index, host in enumerate(hosts):
            _connect(host, switch, f"port{index}", rate_bytes_per_s)
        yield hosts
    finally:
        for namespace in made:
            _run("ip", "netns", "del", namespace)


def _connect(host: Host, switch: str, port: str, rate_bytes_per_s: float) -> None:
    card = ("link", "add", "eth0", "mtu", str(MTU_BYTES), "type", "veth")
    _run("ip", "-n", host.namespace, *card, "peer", "name", port, "mtu", str(MTU_BYTES), "netns", switch)
    _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge0")
    _run("ip", "-n", switch, "link", "set", port, "up")
    shape = ("root", "tbf", "rate", f"{rate_bytes_per_s * 8:.0f}bit", "burst", str(_BURST_BYTES), "latency", "200ms")
    for namespace, device in ((host.namespace, "eth0"), (switch, port)):
        _run("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, *shape)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")
