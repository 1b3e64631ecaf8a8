"""Which device runs which operation, by measured time and the time of moving values between devices.

Pure policy. Operations run one after the other (a captured graph has one order), so the time of a placement is the sum
of the operations' times and of the transfers: a value that is read on a device where it is not is sent there once.

`place` walks the operations in their order. What the rest of the walk depends on is where the values still to be read
are, and where copies of them are already; that is the state, and for each state only the cheapest way into it is kept
(dynamic programming). On chains, trees and series-parallel graphs of a few devices the states are few and the answer is
exact. Where more than `MAX_STATES` are alive at once the cheapest are kept: the answer says that it is not proven, and
carries a lower bound (every operation on its fastest device, every transfer that pinned values force). The plans that
use one device alone are computed as well, and are the floor: a placement that is not faster than the best of them is
not used.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from deepseek.core.errors import ConfigError

MAX_STATES = 4096


@dataclass(frozen=True)
class TimedOperation:
    """One operation and what it costs."""

    name: str
    times_s: Mapping[str, float]
    """Time on each device that can run it."""
    reads: tuple[str, ...] = ()
    """Operations and inputs whose values it reads."""
    output_bytes: int = 0
    beside: str | None = None
    """One of `reads` on whose device it has to run."""


@dataclass(frozen=True)
class Link:
    """The way from one device to another."""

    latency_s: float
    bandwidth_bytes_per_s: float

    def time_s(self, size_bytes: int) -> float:
        """Return the time to send so many bytes."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True)
class Workload:
    """Operations in their order, and the machine."""

    operations: tuple[TimedOperation, ...]
    links: Mapping[tuple[str, str], Link]
    inputs: Mapping[str, tuple[str, int]]
    """Device and bytes of each input."""
    outputs: Mapping[str, str]
    """Device on which each result is wanted."""


@dataclass(frozen=True)
class Placement:
    """A device for each operation."""

    devices: Mapping[str, str]
    time_s: float
    single_device_time_s: Mapping[str, float]
    """Time of each device that runs the whole graph alone."""
    lower_bound_s: float
    is_exact: bool
    """Whether no placement is faster."""

    def __str__(self) -> str:
        alone = ", ".join(f"{name} alone {time_s * 1e3:.3g} ms" for name, time_s in self.single_device_time_s.items())
        proof = "the best there is" if self.is_exact else f"no less than {self.lower_bound_s * 1e3:.3g} ms is possible"
        counts = {
            name: sum(device == name for device in self.devices.values())
            for name in dict.fromkeys(self.devices.values())
        }
        shares = ", ".join(f"{count} on {name}" for name, count in counts.items())
        return f"{self.time_s * 1e3:.3g} ms with {shares} ({proof}); {alone}"


def place(workload: Workload, *, max_states: int = MAX_STATES) -> Placement:
    """Return the fastest placement found.

    Raises `ConfigError` for an operation that no device runs, and for a link that is needed and not given.

    >>> slow_start = TimedOperation("look_up", {"cpu": 1e-3, "gpu": 9e-3}, ("x",), 4096)
    >>> heavy = TimedOperation("multiply", {"cpu": 50e-3, "gpu": 1e-3}, ("look_up",), 4096)
    >>> link = Link(1e-5, 1e10)
    >>> work = Workload((slow_start, heavy), {("cpu", "gpu"): link, ("gpu", "cpu"): link}, {"x": ("cpu", 8)}, {})
    >>> place(work).devices
    {'look_up': 'cpu', 'multiply': 'gpu'}
    """
    _check(workload)
    singles = {
        device: time_s(workload, dict.fromkeys(_names(workload), device)) for device in _find_common_devices(workload)
    }
    devices, found_s, is_exact = _search(workload, max_states)
    best_alone = min(singles, key=lambda device: singles[device], default=None)
    if best_alone is not None and singles[best_alone] <= found_s:
        devices, found_s = dict.fromkeys(_names(workload), best_alone), singles[best_alone]
    bound_s = found_s if is_exact else _bound(workload)
    return Placement(devices, found_s, singles, bound_s, is_exact)


def time_s(workload: Workload, devices: Mapping[str, str]) -> float:
    """Return the time that a placement takes."""
    origin = {name: device for name, (device, _) in workload.inputs.items()} | dict(devices)
    sizes = _sizes(workload)
    wanted = [(name, devices[operation.name]) for operation in workload.operations for name in operation.reads]
    wanted += list(workload.outputs.items())
    sent = [(name, device) for name, device in dict.fromkeys(wanted) if device != origin[name]]
    sent_s = sum(_link(workload, origin[name], device).time_s(sizes[name]) for name, device in sent)
    return sent_s + sum(operation.times_s[devices[operation.name]] for operation in workload.operations)


# Where a value was made, and all devices that hold it.
_Places = tuple[tuple[str, str, frozenset[str]], ...]


@dataclass(frozen=True)
class _Way:
    time_s: float
    chosen: tuple[str, tuple] | None = None  # type: ignore[type-arg]

    def devices(self) -> list[str]:
        """Chosen devices, in the order of the operations."""
        found, link = [], self.chosen
        while link is not None:
            device, link = link
            found.append(device)
        return found[::-1]


def _search(workload: Workload, max_states: int) -> tuple[dict[str, str], float, bool]:
    sizes, last_read = _sizes(workload), _last_reads(workload)
    start = tuple(sorted((name, device, frozenset({device})) for name, (device, _) in workload.inputs.items()))
    ways: dict[_Places, _Way] = {start: _Way(0.0)}
    is_exact = True
    for index, operation in enumerate(workload.operations):
        following: dict[_Places, _Way] = {}
        for state, way in ways.items():
            for device in _allowed(operation, state):
                new_state, sent_s = _step(workload, state, operation, device, sizes)
                alive = tuple(placed for placed in new_state if last_read.get(placed[0], -1) > index)
                total_s = way.time_s + sent_s + operation.times_s[device]
                if alive not in following or total_s < following[alive].time_s:
                    following[alive] = _Way(total_s, (device, way.chosen))  # type: ignore[arg-type]
        if len(following) > max_states:
            cheapest = heapq.nsmallest(max_states, following.items(), key=lambda item: item[1].time_s)
            following, is_exact = dict(cheapest), False
        ways = following
    best, total_s = _finish(workload, ways, sizes)
    return dict(zip(_names(workload), best.devices(), strict=True)), total_s, is_exact


def _allowed(operation: TimedOperation, state: _Places) -> list[str]:
    pinned = [device for name, device, _ in state if name == operation.beside]
    return [device for device in operation.times_s if not pinned or device in pinned]


def _step(
    workload: Workload, state: _Places, operation: TimedOperation, device: str, sizes: Mapping[str, int]
) -> tuple[_Places, float]:
    """Return the state after an operation on a device, and the time of what had to be sent."""
    sent_s = 0.0
    new_state = []
    for name, source, holders in state:
        if name in operation.reads and device not in holders:
            sent_s += _link(workload, source, device).time_s(sizes[name])
            new_state.append((name, source, holders | {device}))
        else:
            new_state.append((name, source, holders))
    new_state.append((operation.name, device, frozenset({device})))
    return tuple(sorted(new_state, key=lambda placed: placed[0])), sent_s


def _finish(workload: Workload, ways: Mapping[_Places, _Way], sizes: Mapping[str, int]) -> tuple[_Way, float]:
    """Return the best way with its results sent to where they are wanted."""
    totals = []
    for state, way in ways.items():
        holders = {name: (source, held) for name, source, held in state}
        sent_s = sum(
            _link(workload, holders[name][0], device).time_s(sizes[name])
            for name, device in workload.outputs.items()
            if device not in holders[name][1]
        )
        totals.append((way.time_s + sent_s, way))
    total_s, best = min(totals, key=lambda total: total[0])
    return best, total_s


def _link(workload: Workload, source: str, device: str) -> Link:
    if (source, device) not in workload.links:
        raise ConfigError(f"a value has to go from {source} to {device} and no such link is given; add it to `links`")
    return workload.links[source, device]


def _bound(workload: Workload) -> float:
    return sum(min(operation.times_s.values()) for operation in workload.operations)


def _names(workload: Workload) -> list[str]:
    return [operation.name for operation in workload.operations]


def _sizes(workload: Workload) -> dict[str, int]:
    sizes = {name: size for name, (_, size) in workload.inputs.items()}
    return sizes | {operation.name: operation.output_bytes for operation in workload.operations}


def _last_reads(workload: Workload) -> dict[str, int]:
    """Return the index of the last operation that reads each value; past the end for results."""
    last: dict[str, int] = {}
    for index, operation in enumerate(workload.operations):
        last |= dict.fromkeys(operation.reads, index)
    return last | dict.fromkeys(workload.outputs, len(workload.operations))


def _find_common_devices(workload: Workload) -> list[str]:
    """Return the devices that can run every operation."""
    first, *others = [list(operation.times_s) for operation in workload.operations] or [[]]
    return [device for device in first if all(device in allowed for allowed in others)]


def _check(workload: Workload) -> None:
    known = set(workload.inputs)
    for operation in workload.operations:
        if not operation.times_s:
            raise ConfigError(f"no device runs {operation.name}; give its time on at least one")
        if operation.beside is not None and operation.beside not in operation.reads:
            raise ConfigError(f"{operation.name} has to run beside {operation.beside}, which it does not read; add it")
        unknown = [name for name in operation.reads if name not in known]
        if unknown:
            raise ConfigError(
                f"{operation.name} reads {unknown[0]}, which nothing before it makes; order the operations"
            )
        known.add(operation.name)
    missing = [name for name in workload.outputs if name not in known]
    if missing:
        raise ConfigError(f"{missing[0]} is wanted as a result and no operation makes it; name one that does")
