"""`deepseek launch ... train --plan`: two ranks that learn as one process, are stopped and killed, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.train.events import read_events
from tests.cli.commands import Result, as_options, assert_one_sentence, start

Call = Callable[..., Result]


def read_until(process: subprocess.Popen[str], kind: str) -> dict[str, Any]:
    """The next event of a kind that `train --json` prints."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["kind"] == kind:
            return event
    raise AssertionError(f"the run ended without {kind}: {process.stderr.read() if process.stderr else ''}")


def find_ranks(folder: Path) -> dict[int, int]:
    """Rank -> process, of those that run on `folder`."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            variables = (
                (path / "environ").read_bytes().decode().split("\0") if f"--set=folder={folder}" in words else []
            )
        except OSError:  # it has ended
            continue
        ranks = [int(variable.partition("=")[2]) for variable in variables if variable.startswith("RANK=")]
        found |= dict.fromkeys(ranks, int(path.name))
    return found


def end_with(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def test_two_ranks_that_are_killed_and_stopped_learn_as_one_process_that_goes_on(
    call: Call, tiny: dict[str, Any], tmp_path: Path
) -> None:
    folder, changes = tmp_path / "run", tiny | {"optimizer.schedule": "constant", "num_steps": 5000}
    words = ["launch", "--ranks", "2", "train", "decoder_tiny", "--plan", "dp=2", "--json", f"--set=folder={folder}"]

    with start(*words, *as_options(changes)) as process:  # one is killed: all end, and nothing half-written is left
        read_until(process, "plan_applied")
        read_until(process, "checkpoint_saved")
        os.kill(find_ranks(folder)[1], signal.SIGKILL)
        result = end_with(process)
    assert result.status == 137, result.err
    assert result.err.splitlines()[-1].startswith("deepseek: rank 1 was ended by SIGKILL, and the others with it")
    assert find_ranks(folder) == {}
    assert not (folder / "model").exists()
    assert not list(folder.rglob("*.tmp*"))

    saved = newest_step(folder)
    with start(*words, *as_options(changes)) as process:  # as by Ctrl-C: the step that was reached is saved
        assert read_until(process, "run_started")["first_step"] == saved
        read_until(process, "step_done")
        process.send_signal(signal.SIGINT)
        result = end_with(process)
    assert result.status == 130, result.err
    assert result.err.splitlines()[-1] == "deepseek: stopped; the same command goes on where it was"
    steps = [event["step"] for event in read_events(folder / "events.jsonl") if event["kind"] == "step_done"]
    assert newest_step(folder) == steps[-1] > saved
    assert find_ranks(folder) == {}

    changes["num_steps"] = newest_step(folder) + 6
    here = call("train", "decoder_tiny", "--json", f"--set=folder={folder}", *as_options(changes))
    alone = call("train", "decoder_tiny", "--json", f"--set=folder={tmp_path / 'alone'}", *as_options(changes))
    assert (here.status, alone.status) == (0, 0)
    usual = {event["step"]: event["loss"] for event in alone.events if event["kind"] == "step_done"}
    steps_done = [event for event in read_events(folder / "events.jsonl") if event["kind"] == "step_done"]
    losses = {event["step"]: event["loss"] for event in steps_done}
    assert losses == pytest.approx(usual, rel=1e-2)
    assert here.kinds[-1] == "model_saved"


def newest_step(folder: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_ranks_without_a_plan_are_refused(
    call: Call, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    result = call("train", "decoder_tiny", f"--set=folder={tmp_path}", *as_options(tiny))
    assert_one_sentence(result, 2, "2 ranks were started and no plan says what each of them does", "--plan dp=2")
    result = call("launch", "--ranks", "2", "--", "train", "decoder_tiny", "--plan", "dp=2")
    assert_one_sentence(result, 2, "already rank 1 of a launch")


def test_what_cannot_be_launched_is_one_sentence(call: Call) -> None:
    assert_one_sentence(call("launch", "--ranks", "2"), 2, "nothing to run")
    assert_one_sentence(call("launch", "--ranks", "2", "--", "info", "x"), 2, "launch was given 'info'")
    assert_one_sentence(call("launch", "--ranks", "0", "--", "train", "decoder_tiny"), 2, "0 ranks do nothing")
    assert_one_sentence(call("launch", "--nodes", "2", "--ranks", "2", "--", "train", "x"), 2, "--endpoint HOST:PORT")


def test_help_of_the_command_that_is_launched_is_its_own(call: Call) -> None:
    result = call("launch", "--ranks", "2", "--", "train", "--help")
    assert result.status == 0
    assert "deepseek train decoder_tiny" in " ".join(result.out.replace("│", " ").split())
