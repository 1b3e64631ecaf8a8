"""Every rule of the table, both ways."""

from __future__ import annotations

import contextlib
import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek.compat.migration.rules import ConfigRule, PythonRule
from tests.compat.migration.checks import (
    RULES,
    config_findings,
    found,
    python_findings,
    settle,
)


@pytest.mark.parametrize("rule", RULES.config, ids=lambda rule: rule.id)
def test_config_rules_find_before_and_not_after(rule: ConfigRule) -> None:
    before = config_findings(rule.before)
    assert rule.id in [each.rule for each in before]
    if before[0].edits:
        assert settle(rule.before, config_findings) == rule.after
    assert config_findings(rule.after) == []


def to_toml(value: dict[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(each)}" for key, each in value.items() if not isinstance(each, dict)]
    for key, each in value.items():
        lines += [f"[{key}]", to_toml(each)] if isinstance(each, dict) else []
    return "\n".join(lines)


@pytest.mark.parametrize(
    "rule", [each for each in RULES.config if each.rename_to or each.set_value], ids=lambda r: r.id
)
@pytest.mark.parametrize(
    ("suffix", "write", "read"), [(".json", json.dumps, json.loads), (".toml", to_toml, tomllib.loads)]
)
def test_config_rules_hold_in_json_and_toml(rule: ConfigRule, suffix: str, write: Any, read: Any) -> None:
    before = write(yaml.safe_load(rule.before))
    after = settle(before, lambda text: config_findings(text, suffix))
    assert read(after) == yaml.safe_load(rule.after)
    assert config_findings(after, suffix) == []


@pytest.mark.parametrize("rule", RULES.python, ids=lambda rule: rule.id)
def test_python_rules_find_before_and_not_after(rule: PythonRule) -> None:
    before = python_findings(rule.before)
    assert {each.rule for each in before} == {rule.id}
    if any(each.edits for each in before):
        assert settle(rule.before, python_findings) == rule.after
    assert python_findings(rule.after) == []
    compile(rule.after, "after", "exec")


def resolves(name: str) -> bool:
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ImportError, AttributeError):
            value: Any = importlib.import_module(".".join(parts[:split]))
            for part in parts[split:]:
                value = getattr(value, part)
            return True
    return False


@pytest.mark.parametrize("rule", [r for r in RULES.python if "." in (r.replace_with or "")], ids=lambda rule: rule.id)
def test_new_names_exist_in_the_installed_libraries(rule: PythonRule) -> None:
    assert resolves(rule.replace_with or "")


@pytest.mark.parametrize("name", ["numpy.product", "numpy.in1d", "numpy.trapz", "numpy.NaN", "transformers.AdamW"])
def test_names_that_rules_call_removed_are_gone(name: str) -> None:
    assert not resolves(name)


def test_rules_up_to_the_source_do_not_apply(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("gradient_clip: 1.0\ncoldStartTimeout: 60\n")
    assert [each.rule for each in found(tmp_path, "v5.0", "v3.5")] == ["config-cold-start"]
    assert [each.rule for each in found(tmp_path, "v3.5")] == ["config-gradient-clip"]
