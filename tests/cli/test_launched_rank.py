"""A rank says nothing itself: what ended it is in the file that the launcher names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.cli import launched_rank
from deepseek.core.errors import CommunicationError, ConfigError
from tests.cli.commands import environment


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def run_here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launched_rank", *words])
    with pytest.raises(SystemExit) as ended:
        launched_rank.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (ConfigError("seen, expected, next"), "PermanentError: seen, expected, next", 2),
        (CommunicationError("rank 1 is gone"), "CommunicationError: rank 1 is gone", 1),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug", 1),
    ],
)
def test_what_ends_a_rank_goes_to_the_launcher(
    error: Exception,
    message: str,
    status: int,
    recorded: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(recipe: str) -> None:
        raise error

    monkeypatch.setattr("deepseek.cli.verbs.train.train", fail)
    assert run_here(monkeypatch, "train", "decoder_tiny") == status
    found = json.loads(recorded.read_text())["message"]
    assert found["message"] == message
    assert capsys.readouterr().err == ""


def test_a_rank_that_was_stopped_has_nothing_to_say(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(recipe: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepseek.cli.verbs.train.train", stop)
    assert run_here(monkeypatch, "train", "decoder_tiny") == 130
    assert not recorded.exists()


def test_a_rank_whose_launcher_is_gone_stops() -> None:
    code = "from deepseek.cli.launched_rank import _end_with; import time; _end_with(0); time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=30, check=False)
    assert ended.returncode == -15
