"""Threads sleep soon while others want their cores, spin again when nobody does, and as the user said where he has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.openmp import SPIN_BOUNDS, SleepingTeam, Waited, YieldPolicy, read_waits, share_waited, yield_cores

NAMES = {*SPIN_BOUNDS, "OMP_WAIT_POLICY"}


def count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def contended() -> YieldPolicy:
    policy = YieldPolicy()
    assert [policy.decide(0.4) for _ in range(2)] == [False, True]
    return policy


def test_waiting_twice_in_a_row_decides_and_calm_decides_after_a_while() -> None:
    policy = contended()
    assert [policy.decide(0.01) for _ in range(4)] == [True, True, True, False]


def test_short_bursts_change_nothing() -> None:
    policy = YieldPolicy()
    assert not any(policy.decide(share) for share in (0.9, 0.01, 0.9, 0.1) * 5)


def test_one_calm_moment_among_others_changes_nothing() -> None:
    policy = contended()
    assert all(policy.decide(share) for share in (0.01, 0.01, 0.01, 0.07) * 5)


@given(st.lists(st.floats(0.05, 0.10), max_size=20))
def test_what_is_neither_much_nor_little_waiting_leaves_it_as_it_is(shares: list[float]) -> None:
    policy = YieldPolicy()
    assert not any(policy.decide(share) for share in shares)
    policy = contended()
    assert all(policy.decide(share) for share in shares)


def test_threads_that_came_and_went_count_from_their_beginning() -> None:
    ms = 1_000_000
    before = {"1": Waited(100 * ms, 10 * ms), "2": Waited(100 * ms, 100 * ms)}
    after = {"1": Waited(160 * ms, 20 * ms), "3": Waited(20 * ms, 10 * ms)}
    assert share_waited(before, after) == pytest.approx(20 / 100)
    assert share_waited(before, before) == 0.0


def test_an_idle_process_whose_watcher_waits_for_its_turn_is_calm() -> None:
    """Beside busy processes the watching thread itself waits for most of the little time that it wants."""
    assert share_waited({"1": Waited(0, 0)}, {"1": Waited(300_000, 4_000_000)}) == 0.0


def test_counts_of_the_kernel_are_read_and_what_is_none_is_left_out(tmp_path: Path) -> None:
    for name, text in {"1": "300 20 7\n", "2": "", "3": "no numbers here"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "4").mkdir()  # a thread that ends between listing and reading
    assert read_waits(tmp_path) == {"1": Waited(300, 20)}
    assert read_waits(tmp_path / "nothing") == {}


@pytest.mark.skipif(not read_waits(), reason="this kernel does not count how long threads wait")
def test_work_is_counted_as_running() -> None:
    before = read_waits()
    sum(range(3_000_000))
    after = read_waits()
    assert sum(now.ran_ns for now in after.values()) > sum(then.ran_ns for then in before.values())


@pytest.mark.skipif(not read_waits(), reason="threads are counted where Linux lists them")
def test_the_team_comes_and_goes_with_all_its_threads() -> None:
    """In a process that may use three threads, on whatever machine."""
    program = (
        "import torch\nfrom tests.core.test_openmp import count_threads, time_until\n"
        "from deepseek.core.openmp import SleepingTeam\n"
        "torch.set_num_threads(3); torch.ones(1 << 20).add_(1)\n"
        "team, before = SleepingTeam(), count_threads()\n"
        "for _ in range(2):\n"
        "    team.set_present(True); team.set_present(True)\n"
        "    time_until(lambda: count_threads() == before + 3)\n"
        "    team.set_present(False); team.set_present(False)\n"
        "    time_until(lambda: count_threads() == before)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def time_until(is_done: object) -> None:
    """Wait until it holds; the runner's limit ends what never does."""
    import time

    assert callable(is_done)
    while not is_done():
        time.sleep(0.01)


def run_command(*arguments: str, **said: str) -> dict[str, object]:
    """What a command's libraries find in the environment, and the threads beside the first, with `said` set."""
    program = (
        "import json, os, sys, threading\n"
        "from deepseek import cli\n"
        "def say(app, words):\n"
        "    names = [thread.name for thread in threading.enumerate()]\n"
        "    print(json.dumps({'torch': 'torch' in sys.modules, 'watched': 'yield-cores' in names, **os.environ}))\n"
        "    return 0\n"
        "cli.run = say\n"
        "cli.main(sys.argv[1:])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | said
    command = [sys.executable, "-c", program, *arguments]
    found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    assert not found["torch"]
    return {name: found[name] for name in ("watched", *sorted(NAMES)) if name in found}


def test_a_command_watches_and_bounds_other_runtimes_before_torch_is_loaded() -> None:
    assert run_command("train", "decoder_tiny") == {"watched": bool(read_waits()), "KMP_BLOCKTIME": "1"}
    assert run_command("train", "decoder_tiny", KMP_BLOCKTIME="200")["KMP_BLOCKTIME"] == "200"


@pytest.mark.parametrize("said", [{"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "0"}, {"GOMP_SPINCOUNT": ""}])
def test_a_command_leaves_alone_what_the_user_said(said: dict[str, str]) -> None:
    assert run_command("serve", "model", **said) == {"watched": False, **said}


def test_no_bound_is_set_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr("deepseek.core.openmp._THREADS", Path("/nowhere"))
    monkeypatch.setattr("deepseek.core.openmp.read_waits", dict)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert yield_cores() is False
    assert not NAMES & set(os.environ)


def test_a_team_that_never_came_can_be_dismissed() -> None:
    SleepingTeam().set_present(False)
