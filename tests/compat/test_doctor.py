"""Hints are judged by what was measured, and made in one process only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deepseek.compat.doctor import HINTS, Hint, apply_hints, diagnose, measure_in_process
from deepseek.core.errors import ConfigError


def test_a_hint_pays_when_every_round_says_so() -> None:
    times = {None: [1.0, 9.0, 1.1], "allocator": [0.5, 0.4, 0.6], "threads": [0.5, 0.5, 9.0], "huge-pages": [1.0] * 3}
    rounds = {name: iter(each) for name, each in times.items()}
    results = diagnose(HINTS, lambda hint: next(rounds[hint.name if hint else None]))
    assert [(each.hint.name, each.before_s, each.after_s, each.pays) for each in results] == [
        ("allocator", 1.1, 0.5, True),
        ("threads", 1.1, 0.5, False),  # one round was slower
        ("huge-pages", 1.1, 1.0, False),  # within the noise
    ]


def test_sides_are_measured_in_turn() -> None:
    order: list[str] = []

    def measure(hint: Hint | None) -> float:
        order.append(hint.name if hint else "none")
        return 1.0

    diagnose(HINTS[:1], measure, num_rounds=2)
    assert order == ["none", "allocator", "none", "allocator"]


def test_a_fresh_process_measures_and_leaves_this_one_alone() -> None:
    before = dict(os.environ)
    assert measure_in_process(HINTS[2]) > 0
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
