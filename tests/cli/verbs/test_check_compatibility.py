"""`deepseek check-compatibility`: a table and JSON."""

from __future__ import annotations

import json

import pytest

from deepseek.cli.verbs.check_compatibility import check_compatibility as run


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    shown = capsys.readouterr().out
    assert "meets 5.0" in shown
    assert ("itself, which is no generation, runs" in shown) == ("unmet" in shown)
    run(json=True)
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {each["status"] for each in checks} <= {"ok", "absent", "unmet", "failing"}
