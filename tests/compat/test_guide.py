"""The page "Choosing and upgrading" does what it says, block by block, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from deepseek.cli.verbs.advise import advise
from deepseek.cli.verbs.check_compatibility import check_compatibility
from deepseek.cli.verbs.migrate import migrate
from deepseek.cli.verbs.train import train

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "choosing-and-upgrading.md"
COMMANDS: dict[str, Callable[..., Any]] = {
    "deepseek advise": advise,
    "deepseek-cli check-compatibility": check_compatibility,
    "deepseek-migrate": migrate,
    "deepseek train": train,
}


def run_command(line: str) -> int:
    if line.startswith("cd "):
        folder, program = line.removeprefix("cd ").split(" && python ")
        return subprocess.run([sys.executable, program], cwd=folder, check=False).returncode
    name = next(each for each in COMMANDS if line.startswith(each))
    app = App(default_command=COMMANDS[name])
    return app(line.removeprefix(name), exit_on_error=False, result_action="return_value") or 0


def run_console(text: str) -> None:
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("$ "):
            status = re.fullmatch(r"exit status (\d)", following)
            assert run_command(line[2:]) == (int(status[1]) if status else 0), line


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(
        r"^```(\w+)(?: title=(\S+))?\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 17
    for language, title, text in blocks:
        if title:
            (tmp_path / title).parent.mkdir(exist_ok=True)
            (tmp_path / title).write_text(text, encoding="utf-8")
        elif language == "console":
            run_console(text)
        else:
            exec(compile(text, f"{PAGE.name}", "exec"), names)
