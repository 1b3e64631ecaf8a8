"""Running `deepseek` as a user would, and what is expected of every failure."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = ["def", "return", "import", "class", "self", "value", "for", "in", "range", "print"]


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    source = random.Random(0)
    for number in range(12):
        lines = [" ".join(source.choices(WORDS, k=8)) for _ in range(120)]
        (folder / f"text{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def as_options(settings: dict[str, Any]) -> list[str]:
    return [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every line of standard output as JSON."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`deepseek` in a process and a session of its own."""
    command = [sys.executable, "-m", "deepseek", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, **{"env": environment()} | pipes | options)


def environment() -> dict[str, str]:
    """Ours without what changes how a terminal is drawn."""
    kept = {name: value for name, value in os.environ.items() if name not in {"FORCE_COLOR", "NO_COLOR", "COLUMNS"}}
    return kept | {"OMP_NUM_THREADS": "1"}


def deepseek(*arguments: object, **options: Any) -> Result:
    """`deepseek` in a process of its own, to its end."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def assert_one_sentence(result: Result, status: int, *words: str) -> None:
    """A failed command says one line on standard error, nothing on standard output, and no traceback."""
    assert result.status == status, result.err
    assert result.err.startswith("deepseek: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    for word in words:
        assert word in result.err


@dataclass(frozen=True)
class Finished:
    """A finished command and its folder."""

    folder: Path
    result: Result
