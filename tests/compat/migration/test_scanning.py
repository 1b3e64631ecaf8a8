"""One odd file never ends a scan."""

from __future__ import annotations

from pathlib import Path

from deepseek.cli.verbs.migrate import migrate as run
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
