"""`deepseek quickstart`: what it shows and leaves, stopped anywhere, started twice, and whoever reads it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.checkpoint.restoring import newest_valid
from tests.cli.commands import Finished, Result, as_options, assert_one_sentence, deepseek, environment, start

Call = Callable[..., Result]
FILES = {"data", "checkpoints", "config.yaml", "events.jsonl", "model", "model-int8", "report.json", "loss.png"}
# Where a run is stopped: right after a line with these words was shown.
PHASES = {
    "tokenizing": '"tokenizer_ready"',
    "training": '"step_done", "step": 8',
    "evaluation": '"checkpoint_saved", "step": 20',
    "saving": '"evaluated"',
    "baselines": '"phase_started", "phase": "counting n-grams"',
    "quantizing": '"phase_started", "phase": "int8"',
    "starting the server": '"phase_started", "phase": "serving"',
    "serving": '"completion_received"',
}
# Half-written data, half a training, half an artifact, and a server that runs; each phase costs a process of its own.
QUICK = ("tokenizing", "training", "saving", "serving")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def copy(quickstarted: Finished, tmp_path: Path) -> Path:
    """The folder of a finished run, to do what one likes with."""
    return shutil.copytree(quickstarted.folder, tmp_path / "copy")


def stop_at(words: str, number: signal.Signals, *arguments: object) -> Result:
    """Run a command and send the signal to its whole group, as a terminal does, when it has said `words`."""
    with start(*arguments) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if words in line:
                os.killpg(process.pid, number)
                break
        out, err = process.communicate(timeout=60)
    return Result(process.returncode, "".join(lines) + out, err)


def test_json_lines_tell_every_phase_and_end_with_the_report(quickstarted: Finished) -> None:
    result = quickstarted.result
    assert (result.status, result.err) == (0, "")
    kinds = [kind for index, kind in enumerate(result.kinds) if kind != "step_done"]
    assert kinds == [
        "tokenizer_ready",
        *("tokenizing_progress", "cache_ready") * 2,
        "run_started",
        *["checkpoint_saved"] * 4,
        "evaluated",
        "model_saved",
        *("phase_started", "baselines_measured"),
        *("phase_started", "model_quantized"),
        *("phase_started", "completion_received", "completion_received", "completion_received"),
        "report_written",
    ]
    report = result.events[-1]["report"]
    assert report == json.loads((quickstarted.folder / "report.json").read_text())


def test_the_folder_holds_the_whole_run_and_nothing_half_written(quickstarted: Finished) -> None:
    assert {path.name for path in quickstarted.folder.iterdir()} == FILES
    assert not [path for path in quickstarted.folder.rglob("*") if path.name.startswith(".")]
    assert (quickstarted.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "phases",
    [pytest.param(QUICK, id="quick"), pytest.param(tuple(PHASES), id="every one", marks=pytest.mark.slow)],
)
def test_ctrl_c_in_a_phase_is_resumable_and_changes_nothing(
    quickstarted: Finished, tiny_moe: dict[str, Any], tmp_path: Path, phases: tuple[str, ...]
) -> None:
    """Each run goes on where the one before was stopped, and the last one ends as the one that was never stopped."""
    command = ["quickstart", "--folder", tmp_path / "run", *as_options(tiny_moe), "--json"]
    for phase in phases:
        words = PHASES[phase]
        result = stop_at(words, signal.SIGINT, *command)
        assert result.status == 130, (phase, result.err)
        first, last = result.err.splitlines()
        assert "stopping at the next safe point" in first
        assert last == "deepseek: stopped; the same command goes on where it was"
        assert words in result.out
        assert "report_written" not in result.kinds
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old"))], phase
    result = deepseek(*command)
    assert (result.status, result.err) == (0, "")
    for model in ("model", "model-int8"):
        assert weights(tmp_path / "run" / model) == weights(quickstarted.folder / model)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert comparable(result) == comparable(quickstarted.result)


def comparable(result: Result) -> dict[str, Any]:
    """The report without what a clock measured, and without the step that the last process began with."""
    report = result.events[-1]["report"]
    train = {name: value for name, value in report["train"].items() if name not in {"tokens_per_s", "first_step"}}
    int8 = {name: value for name, value in report["int8"].items() if name != "decode_speedup"}
    return {"train": train, "int8": int8} | {name: report[name] for name in ("baseline", "versions", "machine")}


def test_a_second_ctrl_c_stops_at_once_and_the_same_command_finishes(tiny_moe: dict[str, Any], tmp_path: Path) -> None:
    # One event in 500 steps: what is between is long enough to be impatient in.
    settings = tiny_moe | {"num_steps": 1500, "log_every": 2000, "checkpoint_every": 500}
    command = ["train", "quickstart", f"--set=folder={tmp_path / 'run'}", *as_options(settings), "--json"]
    with start(*command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        next(line for line in process.stdout if '"checkpoint_saved"' in line)
        process.send_signal(signal.SIGINT)
        assert "again stops at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "deepseek: stopped; the same command goes on where it was\n"
    assert "checkpoint_saved" not in out
    kept = newest_valid(tmp_path / "run" / "checkpoints")
    assert kept is not None
    assert kept.step == 500
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old"))]


def test_sigterm_saves_and_ends_with_143(tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny | {"checkpoint_every": 500}
    command = ["train", "decoder_tiny", f"--set=folder={tmp_path / 'run'}", *as_options(settings), "--json"]
    result = stop_at('"step_done", "step": 4', signal.SIGTERM, *command)
    assert result.status == 143
    assert result.err.splitlines()[-1] == "deepseek: stopped; the same command goes on where it was"
    saved = newest_valid(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step >= 4


def test_a_finished_run_started_again_reports_the_whole_run(
    quickstarted: Finished, copy: Path, tiny_moe: dict[str, Any]
) -> None:
    result = deepseek("quickstart", "--folder", copy, *as_options(tiny_moe), "--json")
    assert result.status == 0
    assert "step_done" not in result.kinds
    assert comparable(result) == comparable(quickstarted.result)
    assert result.events[-1]["report"]["train"]["first_step"] == 20
    assert quickstarted.result.events[-1]["report"]["train"]["first_step"] == 0


@pytest.mark.parametrize("library", ["plotext", "matplotlib", "uvicorn", "prometheus_client"])
def test_a_library_that_only_the_end_needs_is_missed_at_the_start(
    call: Call, tiny_moe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # how Python itself marks a module that is not there
    result = call("quickstart", "--folder", tmp_path / "run", *as_options(tiny_moe), "--json")
    assert_one_sentence(result, 1, library, "pip install 'deepseek-engine[")
    assert list(tmp_path.iterdir()) == []


def test_another_learning_rate_is_refused_and_leaves_the_run_as_it_was(
    call: Call, copy: Path, tiny_moe: dict[str, Any]
) -> None:
    before = (copy / "report.json").read_bytes(), weights(copy / "model")
    options = as_options(tiny_moe | {"optimizer.weight_decay": 0.5})
    result = call("quickstart", "--folder", copy, *options, "--json")
    assert_one_sentence(result, 1, "optimizer.weight_decay was ", "choose another folder")
    assert before == ((copy / "report.json").read_bytes(), weights(copy / "model"))


def test_what_is_no_terminal_gets_plain_lines(copy: Path, tiny_moe: dict[str, Any]) -> None:
    """All of the end is there in characters: the curve, the table, where the files are."""
    result = deepseek("quickstart", "--folder", copy, *as_options(tiny_moe))
    assert (result.status, result.err) == (0, "")
    assert "\x1b" not in result.out
    assert "\r" not in result.out
    assert max(map(len, result.out.splitlines())) < 200
    for words in ("held-out loss", "served 'def get'", "bigram, discounted", "wall time, from step 20 on", "loss.png"):
        assert words in result.out


def on_a_terminal(columns: int, *arguments: object) -> tuple[int, str]:
    """`deepseek` on a terminal of its own: exit status, and everything that was drawn."""
    command = [sys.executable, "-m", "deepseek", *map(str, arguments)]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    there = environment() | {"TERM": "xterm-256color"}
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=there, start_new_session=True
    ) as process:
        os.close(slave)
        drawn = b""
        try:
            while piece := os.read(master, 1 << 16):
                drawn += piece
        except OSError:  # what Linux says instead of an end of file
            pass
        os.close(master)
    return process.returncode, drawn.decode()


@pytest.mark.parametrize("columns", [40, 120])
def test_a_terminal_gets_bars_that_fit_and_its_cursor_back(
    tiny_moe: dict[str, Any], tmp_path: Path, columns: int
) -> None:
    settings = as_options(tiny_moe | {"num_steps": 300, "log_every": 10})
    status, drawn = on_a_terminal(columns, "quickstart", "--folder", tmp_path / "run", *settings)
    assert status == 0
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") > 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn))
    bars = [line for line in lines if re.match(r"\S? *(tokenizing|training|counting n-grams|int8|serving) ", line)]
    for name in ("training", "int8", "serving"):
        assert any(name in line for line in bars), name
    assert any("tokens/s" in line for line in bars)
    assert all(len(line) <= columns for line in bars)
    tables = [line for line in lines if line and line[0] in "┏┃┡│└"]
    assert tables
    assert all(len(line) <= columns for line in tables)
    assert "━━" in drawn or columns == 40
    assert "┤" in drawn  # the curve


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "lines"])
def test_a_reader_that_leaves_ends_the_run_and_the_same_command_finishes(
    quickstarted: Finished, tiny_moe: dict[str, Any], tmp_path: Path, options: list[str]
) -> None:
    """`deepseek quickstart | head -2`."""
    command = ["quickstart", "--folder", tmp_path / "run", *as_options(tiny_moe), *options]
    with start(*command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(2):
            process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (128 + signal.SIGPIPE, "")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old"))]
    if options:
        assert deepseek(*command).status == 0
        assert weights(tmp_path / "run" / "model") == weights(quickstarted.folder / "model")
