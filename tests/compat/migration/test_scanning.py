"""One odd file never ends a scan."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from deepseek.cli.verbs.migrate import migrate as run
from deepseek.compat.migration.scanning import check_in_processes, list_files, scan_files, survey
from tests.compat.migration.checks import (
    found,
)


def test_broken_files_are_reported_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import numpy as np\nx = np.float(\n")
    (tmp_path / "b.py").write_text("import numpy as np\nx = np.float\n")
    (tmp_path / "c.yaml").write_bytes(b"gradient_clip: \xff\n")
    (tmp_path / "d.py").write_bytes(b"x = '\xff'\n")
    assert [each.rule for each in found(tmp_path)] == ["unreadable", "python-numpy-float", "unreadable", "unreadable"]
    assert run(tmp_path) == 2


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    for name in ("a.py", "b.sh", "c.sh", "README", ".git/config", "data/big.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    seen = survey(tmp_path)
    assert seen.files == (tmp_path / "a.py",)
    assert str(seen) == "not looked at: 4 files (.sh 2, no suffix 1, .jsonl 1); folders .git"


def test_patterns_exclude_names_and_paths(tmp_path: Path) -> None:
    for name in ("a.py", "old/a.py", "old/deep/b.py", "c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    names = [str(path.relative_to(tmp_path)) for path in list_files(tmp_path, ["old/deep", "c.*"])]
    assert names == ["a.py", "old/a.py"]


def test_an_error_inside_a_check_becomes_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr("deepseek.compat.migration.scanning.check_python", fail)
    (tmp_path / "a.py").write_text("import numpy as np\nx = np.float\n")
    (tmp_path / "b.yaml").write_text("gradient_clip: 1\n")
    findings = found(tmp_path)
    assert [finding.rule for finding in findings] == ["unreadable", "config-gradient-clip"]
    assert "ZeroDivisionError odd; exclude it with --exclude" in str(findings[0])


def test_pipes_are_not_opened_and_large_files_not_read(tmp_path: Path) -> None:
    for suffix in (".py", ".yaml", ".safetensors", ".pt"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / "data.json").write_text(" " * 6_000_000)
    (tmp_path / "large.yaml").write_text("gradient_clip: 1\n" + "# x\n" * 2_000_000)
    assert {each.path: each.rule for each in found(tmp_path)} == {
        **{f"pipe{suffix}": "unreadable" for suffix in (".py", ".yaml", ".safetensors", ".pt")},
        "large.yaml": "unreadable",
    }


def test_many_files_are_checked_on_several_processors_in_order(tmp_path: Path) -> None:
    for number in range(1001):
        (tmp_path / f"{number:04d}.py").write_text("import numpy as np\nx = np.float\n" if number % 500 == 0 else "")
    seen: list[tuple[int, int]] = []
    files = list_files(tmp_path)
    findings = scan_files(tmp_path, files, "v5.0", on_progress=lambda done, total: seen.append((done, total)))
    assert [each.path for each in findings] == ["0000.py", "0500.py", "1000.py"]
    assert seen[-1] == (1001, 1001)


LAUGHS = "b0: &b0 {fp16: true}\n" + "".join(
    f"b{level}: &b{level}\n  <<: [{', '.join([f'*b{level - 1}'] * 10)}]\n" for level in range(1, 12)
)
ODD = {
    "merges.yaml": "gradient_clip: 1\n" + LAUGHS,
    "itself.yaml": "gradient_clip: 1\ndistributed: &d\n  tensor_parallel: 1\n  self: *d\n",
    "deep.json": '{"gradient_clip": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep.yaml": "gradient_clip: 1\na: " + "{a: " * 5000 + "1" + "}" * 5000,
    "deep.py": "import torch\nx = " + "1+" * 50_000 + "1\ntorch.load(x)\n",
    "calls.py": "import torch\nx = f" + "()" * 20_000 + "\ntorch.load(x)\n",
    "digits.json": '{"gradient_clip": ' + "9" * 10_000 + "}",
    "object.yaml": "gradient_clip: 1\nx: !!python/object/apply:os.abort []\n",
    "rot13.py": "# coding: rot13\nvzcbeg gbepu\ntorch.load autocast\n",
    "cells.ipynb": '{"cells": [1, {"source": 5}], "torch": "load"}',
    "line\nend.py": "import torch\ntorch.load(x)\n",
    "zeros.pt": "\0" * 10_240,
}


def test_odd_texts_and_files_without_an_end_do_not_stop_a_scan(tmp_path: Path) -> None:
    for name, text in ODD.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name in ("pipe.yaml", "pipe.py", "pipe.pt", "pipe.safetensors", "pipe.ipynb"):
        os.mkfifo(tmp_path / name)
    for name in ("endless.yaml", "endless.py", "endless.pt", "endless.safetensors"):
        (tmp_path / name).symlink_to("/dev/zero")
    for folder in ("pipe", "endless"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "pipe" / "model.safetensors.index.json")
    (tmp_path / "endless" / "model.safetensors.index.json").symlink_to("/dev/zero")
    with (tmp_path / "huge.json").open("wb") as file:
        file.write(b'{"gradient_clip": 1}')
        file.truncate(8 << 30)
    (tmp_path / "last.py").write_text("import numpy as np\nx = np.float\n")
    findings = found(tmp_path)
    assert [finding.path for finding in findings if finding.rule == "python-numpy-float"] == ["last.py"]
    unread = {finding.path for finding in findings if finding.is_unreadable}
    assert unread >= {"pipe.yaml", "pipe.pt", "endless.safetensors", "pipe", "endless", "huge.json", "zeros.pt"}
    assert unread >= {"deep.json", "deep.yaml", "deep.py", "calls.py", "cells.ipynb"}
    assert {"merges.yaml", "itself.yaml", "object.yaml", r"line\nend.py"} <= {
        finding.path for finding in findings if not finding.is_unreadable
    }
    assert all("\n" not in str(finding) for finding in findings)


def test_files_that_end_their_process_are_named_and_all_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does to a process that takes too much memory."""
    (tmp_path / "deadly.py").write_text(
        "import os\ndef check(path):\n    return os._exit(9) if path.name in ('3.py', '7.py') else [path.name]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    deadly = importlib.import_module("deadly")

    files = [tmp_path / f"{number}.py" for number in range(10)]
    found = list(check_in_processes(deadly.check, files, tmp_path, num_processes=2))
    assert [row[0] for row in found if isinstance(row[0], str)] == [f"{n}.py" for n in range(10) if n not in (3, 7)]
    assert [row[0].path for row in found if not isinstance(row[0], str)] == ["3.py", "7.py"]


PYTHON_2 = {
    "print.py": "def main():\n    print 'hello'\n",
    "exec.py": "exec 'a = 1' in {}\n",
    "except.py": "try:\n    pass\nexcept (IOError, OSError), error:\n    pass\n",
    "raise.py": "raise ValueError, 'no'\n",
    "tuple.py": "def f((a, b), c):\n    return a <> b\n",
    "octal.py": "MODE = 0777\n",
    "long.py": "x = 10L\n",
    "tabs.py": "def f():\n\tif True:\n        return 1\n",
    "ticks.py": "x = `1`\n",
    "conflict.py": "<<<<<<< HEAD\nx = 1\n=======\nx = 2\n>>>>>>> other\n",
}


def test_a_project_that_is_no_python_of_today_is_not_clean(tmp_path: Path) -> None:
    for name, text in PYTHON_2.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "fine.py").write_text("print('hello')\n")
    cells = '{"cells": [{"cell_type": "code", "source": "print 1"}], "metadata": {"kernelspec": {"name": "python2"}}}'
    (tmp_path / "old.ipynb").write_text(cells)
    (tmp_path / "other.ipynb").write_text(cells.replace("}}}", '}, "language_info": {"name": "R"}}}'))
    findings = {finding.path: finding for finding in found(tmp_path)}
    assert set(findings) == {*PYTHON_2, "old.ipynb"}
    assert all(finding.is_unreadable for finding in findings.values())
    assert "port it to Python 3 first" in findings["print.py"].fix
    assert run(tmp_path) == 2


def test_a_large_project_is_parsed_where_it_looks_like_python_2_and_says_so(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number:04d}.py").write_text("x = 1\n")
    (tmp_path / "old.py").write_text("print 'hello'\n")
    (tmp_path / "prose.py").write_text('x = """\nprint this, a <> b\n"""\n')
    (tmp_path / "broken.py").write_text("def f(:\n")
    listed = survey(tmp_path)
    assert [finding.path for finding in scan_files(tmp_path, listed.files, "v5.0")] == ["old.py"]
    assert "the syntax of sources that name no rule and do not look like Python 2" in str(listed)


def test_what_a_link_out_of_the_project_leads_to_is_left_to_a_person(tmp_path: Path) -> None:
    (tmp_path / "outside.yaml").write_text("gradient_clip: 1\n")
    project = tmp_path / "project"
    project.mkdir()
    (project / "own.yaml").write_text("gradient_clip: 1\n")
    (project / "neighbor.yaml").symlink_to("own.yaml")
    (project / "out.yaml").symlink_to("../outside.yaml")
    (project / "absolute.yaml").symlink_to(project / "own.yaml")
    is_fixable = {finding.path: finding.is_fixable for finding in found(project)}
    assert is_fixable == {"own.yaml": True, "neighbor.yaml": True, "out.yaml": False, "absolute.yaml": False}
