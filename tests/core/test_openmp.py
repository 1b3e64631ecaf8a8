"""The bound is there before torch is loaded, in children too, and never where the user has said otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from deepseek.core.openmp import SPIN_BOUNDS, bound_spins


@pytest.mark.parametrize(
    ("said", "added"),
    [
        ({}, SPIN_BOUNDS),
        ({"GOMP_SPINCOUNT": "infinity"}, {"KMP_BLOCKTIME": SPIN_BOUNDS["KMP_BLOCKTIME"]}),
        ({"GOMP_SPINCOUNT": ""}, {"KMP_BLOCKTIME": SPIN_BOUNDS["KMP_BLOCKTIME"]}),
        ({"KMP_BLOCKTIME": "200"}, {"GOMP_SPINCOUNT": SPIN_BOUNDS["GOMP_SPINCOUNT"]}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {}),
    ],
)
def test_what_the_user_set_stays(said: dict[str, str], added: dict[str, str]) -> None:
    environment = dict(said)
    assert bound_spins(environment) == added
    assert environment == said | added
    assert bound_spins(environment) == {}


def run_command(*arguments: str, **said: str) -> dict[str, str]:
    """The spin settings that a command's libraries find, with `said` in the environment."""
    program = (
        "import json, os, sys\n"
        "from deepseek import cli\n"
        "cli.run = lambda app, words: print(json.dumps({'torch': 'torch' in sys.modules, **os.environ})) or 0\n"
        "cli.main(sys.argv[1:])\n"
    )
    names = {*SPIN_BOUNDS, "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in names} | said
    command = [sys.executable, "-c", program, *arguments]
    found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    assert not found["torch"]
    return {name: found[name] for name in sorted(names) if name in found}


def test_a_command_sets_the_bound_before_torch_is_loaded() -> None:
    assert run_command("train", "decoder_tiny") == SPIN_BOUNDS


def test_a_command_leaves_a_wait_policy_alone() -> None:
    assert run_command("serve", "model", OMP_WAIT_POLICY="passive") == {"OMP_WAIT_POLICY": "passive"}


def test_the_runtime_reads_the_bound() -> None:
    """GNU's runtime prints what it has read when torch loads it; others are not loaded by torch's build here."""
    program = "from deepseek.core.openmp import bound_spins\nbound_spins()\nimport torch"
    environment = {name: value for name, value in os.environ.items() if name not in SPIN_BOUNDS}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's OpenMP runtime is not GNU's")
    assert f"GOMP_SPINCOUNT = '{SPIN_BOUNDS['GOMP_SPINCOUNT']}'" in done.stderr


def test_nothing_is_set_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    for name in (*SPIN_BOUNDS, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert bound_spins() == {}
    assert not set(SPIN_BOUNDS) & set(os.environ)
