"""`deepseek check-compatibility`: a table and JSON."""

from __future__ import annotations

import json

import pytest

from deepseek.cli.verbs.check_compatibility import check_compatibility as run


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert "can run 5.0" in capsys.readouterr().out
    run(json=True)
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {each["status"] for each in checks} <= {"ok", "absent", "failing"}
