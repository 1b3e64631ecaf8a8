"""Settings of the environment that pay on this machine, each measured before it is recommended.

    for result in diagnose(): print(result.hint.name, result.before_s, result.after_s, result.hint.line)

glibc gives every large activation back to the kernel and gets it back page by page; keeping the memory made inference
of a convolutional network two to three times faster where this was first measured. OpenMP's threads spin while their
partner is not scheduled, which costs a training step most of its time beside another program. Whether such a setting
pays here is found by running a small job in fresh processes, with and without each hint in turn, since none of them can
be taken back in a process. Cost: some seconds for each hint and round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from deepseek.core import allocator
from deepseek.core.errors import ConfigError
from deepseek.core.machine import describe_machine
from deepseek.core.names import explain_unknown
from deepseek.core.openmp import SPIN_BOUNDS

_NUM_ROUNDS = 3
_NUM_RUNS = 8
_NUM_STEPS = 30
# A gain below this is within the noise of a shared machine.
_LEAST_GAIN = 1.1


# What a hint is measured on: passes of a network on a machine as it is, or training steps beside a busy process.
WorkKind = Literal["network", "steps-beside-another"]


@dataclass(frozen=True)
class Hint:
    """One setting: what it is called, why it may pay, what it costs, and how it is made in a process."""

    name: str
    why: str
    cost: str
    apply: Callable[[], None] = field(default=lambda: None, compare=False)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that must stand before torch is imported."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Variables with which a program of the user's own is started, where they are not those of `environment`."""
    job: WorkKind = "network"

    @property
    def line(self) -> str:
        """The setting as a line of a shell, for programs that do not call `apply_hints`."""
        return " ".join(
            ("export", *(f"{name}={value}" for name, value in (self.variables or self.environment).items()))
        )


@dataclass(frozen=True)
class Diagnosis:
    """One hint, measured: seconds for one pass or step without and with it, a number for each round."""

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
    if not allocator.keep_freed_memory():
        raise ConfigError("this C library has no mallopt; the allocator hint is for glibc on Linux")


def _halve_threads() -> None:
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // 2))


HINTS: tuple[Hint, ...] = (
    Hint(
        "allocator",
        "keep large blocks instead of giving them back",
        "memory returns to the system late",
        _keep_memory,
        variables=allocator.ENVIRONMENT,
    ),
    Hint(
        "threads",
        "half the threads, where two share one core",
        "slower where they do not",
        _halve_threads,
        variables={"OMP_NUM_THREADS": str(max(1, describe_machine()["num_cores"] // 2))},
    ),
    Hint(
        "huge-pages",
        "2 MB pages for large tensors",
        "memory in larger pieces; set before torch is imported",
        environment={"THP_MEM_ALLOC_ENABLE": "1"},
    ),
    Hint(
        "spins",
        "threads that wait sleep soon, for a machine that is always shared; measured beside a busy process",
        "up to half of the speed alone; the commands of deepseek, and programs that call "
        "deepseek.core.openmp.yield_cores(), do it only while others want the cores; set before torch is imported",
        environment=SPIN_BOUNDS,
        job="steps-beside-another",
    ),
)


def diagnose(
    hints: Sequence[Hint] = HINTS,
    measure: Callable[[WorkKind, Hint | None], float] | None = None,
    num_rounds: int = _NUM_ROUNDS,
) -> list[Diagnosis]:
    """Measure every hint's job with and without it, in turn within each round so that both see the same machine."""
    measure = measure or measure_in_process
    before_s: dict[WorkKind, list[float]] = {hint.job: [] for hint in hints}
    after_s: dict[str, list[float]] = {hint.name: [] for hint in hints}
    for _ in range(num_rounds):
        for job, durations_s in before_s.items():
            durations_s.append(measure(job, None))
            for hint in hints:
                if hint.job == job:
                    after_s[hint.name].append(measure(job, hint))
    return [Diagnosis(hint, tuple(before_s[hint.job]), tuple(after_s[hint.name])) for hint in hints]


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


def measure_in_process(job: WorkKind, hint: Hint | None) -> float:
    """Seconds for one pass or step of `job` in a fresh process with `hint`, and without the others' variables."""
    ours = {name for hint in HINTS for name in hint.environment}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-m", "deepseek.compat.doctor", job, *([hint.name] if hint else [])]
    result = subprocess.run(  # noqa: S603 - our own interpreter
        command, check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
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


def time_steps_beside_another() -> float:
    """Median seconds of a training step of a small network in this process, beside one that keeps a core busy."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    x = torch.randn(512, 256)
    seconds = []
    with _busy_process():
        for _ in range(_NUM_STEPS):
            started_s = time.perf_counter()
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


@contextmanager
def _busy_process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


_JOBS: dict[str, Callable[[], float]] = {"network": time_network, "steps-beside-another": time_steps_beside_another}

if __name__ == "__main__":
    apply_hints(sys.argv[2:])
    sys.stdout.write(f"{_JOBS[sys.argv[1]]()}\n")
