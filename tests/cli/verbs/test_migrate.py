"""`deepseek migrate`: what it prints, its exit status, and the arguments it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli.verbs.migrate import migrate as run
from deepseek.core.errors import ConfigError


def test_the_command_says_place_rule_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text("import numpy as np\nx = np.float\n")
    assert run(check=tmp_path, target="v5.0") == 1
    assert "a.py:2:5: error python-numpy-float: the alias of the built-in type is gone" in capsys.readouterr().out
    assert run(check=tmp_path, json=True) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["line"], finding["column"], finding["is_fixable"]) == (2, 5, True)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert run(tmp_path) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one path"),
        ({"path": Path("missing")}, "missing does not exist"),
        ({"path": Path(), "apply": True}, "give both or none"),
        ({"path": Path(), "apply": True, "out": Path("inside")}, "lies inside"),
        ({"path": Path(), "apply": True, "out": Path("/tmp")}, "exists"),
        ({"path": Path(), "target": "v9"}, "unknown generation 'v9'"),
        ({"path": Path(), "target": "v2.0", "source": "v3.0"}, "a migration goes up"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**arguments)
