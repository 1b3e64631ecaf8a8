"""Hints are judged by what was measured, and made in one process only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deepseek.compat.doctor import (
    HINTS,
    Hint,
    WorkKind,
    apply_hints,
    diagnose,
    measure_in_process,
    time_steps_beside_another,
)
from deepseek.core.errors import ConfigError


def test_a_hint_pays_when_every_round_says_so() -> None:
    times = {
        "network": [1.0, 9.0, 1.1],
        "allocator": [0.5, 0.4, 0.6],
        "threads": [0.5, 0.5, 9.0],
        "huge-pages": [1.0] * 3,
        "steps-beside-another": [3.0, 4.0, 5.0],
        "spins": [0.5, 0.4, 1.2],  # more than without a neighbor, and less than its own job without it
    }
    rounds = {name: iter(durations_s) for name, durations_s in times.items()}
    results = diagnose(HINTS, lambda job, hint: next(rounds[hint.name if hint else job]))
    assert [(result.hint.name, result.before_s, result.after_s, result.pays) for result in results] == [
        ("allocator", 1.1, 0.5, True),
        ("threads", 1.1, 0.5, False),  # one round was slower
        ("huge-pages", 1.1, 1.0, False),  # within the noise
        ("spins", 4.0, 0.5, True),
    ]


def test_sides_are_measured_in_turn() -> None:
    order: list[str] = []

    def measure(job: WorkKind, hint: Hint | None) -> float:
        order.append(hint.name if hint else job)
        return 1.0

    diagnose((HINTS[0], HINTS[3]), measure, num_rounds=2)
    assert order == ["network", "allocator", "steps-beside-another", "spins"] * 2


def test_a_fresh_process_measures_and_leaves_this_one_alone() -> None:
    before = dict(os.environ)
    assert measure_in_process("network", HINTS[2]) > 0
    assert dict(os.environ) == before


def test_kept_memory_is_really_kept() -> None:
    """The kernel counts fewer page faults when large blocks are allocated again and again."""
    program = (
        "import resource, sys\nfrom deepseek.compat.doctor import apply_hints\n"
        "apply_hints(sys.argv[1:])\nfor _ in range(50): b = bytearray(8 << 20); del b\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    faults = [
        int(subprocess.run([sys.executable, "-c", program, *names], stdout=subprocess.PIPE, check=True).stdout)
        for names in ([], ["allocator"])
    ]
    assert faults[1] < faults[0]


@pytest.mark.parametrize(
    ("names", "message"), [(["alocator"], "did you mean 'allocator'"), (["huge-pages"], "before torch")]
)
def test_what_cannot_be_applied_is_refused(names: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    with pytest.raises(ConfigError, match=message):
        apply_hints(names)


def test_a_job_without_its_hint_does_not_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself bounds spins, and its children would measure the bound against itself."""
    seen: list[dict[str, str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        environment = options["env"]
        assert isinstance(environment, dict)
        seen.append(environment)
        return subprocess.CompletedProcess(command, 0, stdout="1.0\n")

    monkeypatch.setattr("deepseek.compat.doctor.subprocess.run", run)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    measure_in_process("steps-beside-another", None)
    assert "GOMP_SPINCOUNT" not in seen[0]
    assert seen[0]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("hint", HINTS, ids=lambda hint: hint.name)
def test_the_line_of_a_hint_is_one_that_a_shell_takes(hint: Hint) -> None:
    done = subprocess.run(["sh", "-c", f"{hint.line}; env"], stdout=subprocess.PIPE, text=True, check=True)
    wanted = hint.variables or hint.environment
    assert wanted
    assert wanted.items() <= dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line).items()


def test_the_allocators_line_keeps_memory_as_the_call_does() -> None:
    program = (
        "import resource\nfor _ in range(50): b = bytes(1) * (8 << 20); del b\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    faults = [
        int(subprocess.run(["sh", "-c", f"{line}exec {sys.executable} -c '{program}'"], stdout=-1, check=True).stdout)
        for line in ("", f"{HINTS[0].line}; ")
    ]
    assert faults[1] < faults[0]


def test_a_busy_process_is_there_while_steps_are_timed_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr("deepseek.compat.doctor.subprocess.Popen", start)
    monkeypatch.setattr("deepseek.compat.doctor._NUM_STEPS", 2)
    assert time_steps_beside_another() > 0
    assert [process.returncode for process in started] == [-9]
