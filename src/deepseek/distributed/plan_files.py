"""Plans as users write them: settings on a command line, or a file that `deepseek plan --json` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from deepseek.core.config import SETTINGS_SUFFIXES, parse_overrides, read_settings
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.plan import Plan


def read_plan(text: str) -> Plan:
    """Read a plan: `tp=2,dp=2,zero_stage=3`, or a JSON, YAML or TOML file with these settings.

    What `deepseek plan --json` prints is read as its best plan. Raises `ConfigError` for an unknown setting.

    >>> read_plan("tp=2,dp=2").num_devices
    4
    """
    return Plan(**read_plan_settings(text))


def read_plan_settings(text: str) -> dict[str, Any]:
    """Read a plan as `read_plan` does, as those of its settings that are written there.

    >>> read_plan_settings("tp=2,dp=2")
    {'tp': 2, 'dp': 2}
    """
    if Path(text).suffix in SETTINGS_SUFFIXES:
        settings = _find_plan(read_settings(Path(text)))
    else:
        settings = parse_overrides([part.strip() for part in text.split(",") if part.strip()])
    known = [field.name for field in fields(Plan)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"{explain_unknown('setting of a plan', name, known)} in {text!r}")
    return dict(settings)


def _find_plan(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the plan in what a search for plans printed, or all of the file's."""
    for key in ("best", "plan"):
        if isinstance(values.get(key), Mapping):
            values = values[key]
    return values
