"""Settings of the environment that pay on this machine, each measured before it is recommended.

    for result in diagnose(): print(result.hint, result.before_s, result.after_s)

glibc gives every large activation back to the kernel and gets it back page by page; keeping the memory made inference
of a convolutional network two to three times faster where this was first measured. Whether it does here, and whether
fewer threads or huge pages do, is found by running one small network in fresh processes, with and without each hint
in turn, since none of them can be taken back in a process. Cost: some seconds for each hint and round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deepseek.core.allocator import keep_freed_memory
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

_NUM_ROUNDS = 3
_NUM_RUNS = 8
# A gain below this is within the noise of a shared machine.
_LEAST_GAIN = 1.1


@dataclass(frozen=True)
class Hint:
    """One setting: what it is called, why it may pay, what it costs, and how it is made in a process."""

    name: str
    why: str
    cost: str
    apply: Callable[[], None] = field(default=lambda: None, compare=False)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that must stand before torch is imported."""


@dataclass(frozen=True)
class Diagnosis:
    """One hint, measured: seconds for one pass without and with it, a number for each round."""

    hint: Hint
    rounds_before_s: tuple[float, ...]
    rounds_after_s: tuple[float, ...]

    @property
    def before_s(self) -> float:
        """Median without the hint."""
        return statistics.median(self.rounds_before_s)

    @property
    def after_s(self) -> float:
        """Median with the hint."""
        return statistics.median(self.rounds_after_s)

    @property
    def gain(self) -> float:
        """How many times faster."""
        return self.before_s / self.after_s

    @property
    def pays(self) -> bool:
        """Whether the gain is more than noise: every round with the hint was faster than every one without."""
        return self.gain >= _LEAST_GAIN and max(self.rounds_after_s) < min(self.rounds_before_s)


def _keep_memory() -> None:
    if not keep_freed_memory():
        raise ConfigError("this C library has no mallopt; the allocator hint is for glibc on Linux")


def _halve_threads() -> None:
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // 2))


HINTS: tuple[Hint, ...] = (
    Hint(
        "allocator", "keep large blocks instead of giving them back", "memory returns to the system late", _keep_memory
    ),
    Hint("threads", "half the threads, where two share one core", "slower where they do not", _halve_threads),
    Hint(
        "huge-pages",
        "2 MB pages for large tensors",
        "memory in larger pieces; set before torch is imported",
        environment={"THP_MEM_ALLOC_ENABLE": "1"},
    ),
)


def diagnose(
    hints: Sequence[Hint] = HINTS, measure: Callable[[Hint | None], float] | None = None, num_rounds: int = _NUM_ROUNDS
) -> list[Diagnosis]:
    """Measure every hint against its absence, in turn within each round so that both see the same machine."""
    measure = measure or measure_in_process
    seconds: dict[str | None, list[float]] = {}
    for _ in range(num_rounds):
        for hint in (None, *hints):
            seconds.setdefault(hint.name if hint else None, []).append(measure(hint))
    return [Diagnosis(hint, tuple(seconds[None]), tuple(seconds[hint.name])) for hint in hints]


def apply_hints(names: Sequence[str]) -> None:
    """Make settings in this process, for as long as it lives.

    Raises `ConfigError` for unknown names, on systems without them, and for one that comes after the import of torch.
    """
    known = {hint.name: hint for hint in HINTS}
    for name in names:
        if name not in known:
            raise ConfigError(explain_unknown("hint", name, known))
    # Those of the environment first: others import torch.
    for hint in sorted((known[name] for name in names), key=lambda each: not each.environment):
        if hint.environment and "torch" in sys.modules:
            raise ConfigError(f"{hint.name} must be set before torch is imported; apply it first thing in the program")
        os.environ.update(hint.environment)
        hint.apply()


def measure_in_process(hint: Hint | None) -> float:
    """Seconds for one pass of the small network in a fresh process with `hint`."""
    command = [sys.executable, "-m", "deepseek.compat.doctor", *([hint.name] if hint else [])]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own interpreter
    return float(result.stdout)


def time_network() -> float:
    """Median seconds of a pass through a small convolutional network in this process."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Hardswish()) for _ in range(4)]
    network = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), *blocks).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode():
        network(image)
        for _ in range(_NUM_RUNS):
            started_s = time.perf_counter()
            network(image)
            seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


if __name__ == "__main__":
    apply_hints(sys.argv[1:])
    sys.stdout.write(f"{time_network()}\n")
