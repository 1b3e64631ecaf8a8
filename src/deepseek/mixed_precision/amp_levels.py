"""How much of a model is put into 16 bits: the levels O0, O1 and O2, from a config or from the environment.

    O0   everything in FP32
    O1   FP32 weights; matmuls compute in 16 bits (the default)
    O2   16-bit weights beside FP32 masters that the optimizer updates

What is said in code or in a config's `ds_amp_level` decides; the environment variable `DS_AMP_LEVEL` speaks where
nothing else does. `PrecisionManager` carries a level out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Level = Literal["O0", "O1", "O2"]

CONFIG_KEY = "ds_amp_level"
ENVIRONMENT_VARIABLE = "DS_AMP_LEVEL"
DEFAULT: Level = "O1"


def choose_level(
    level: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Level:
    """Choose the level: `level`, else `settings["ds_amp_level"]`, else `DS_AMP_LEVEL`, else `O1`.

    Raises `ConfigError` for an unknown level, saying where it stood.

    >>> choose_level(settings={"ds_amp_level": "O2"}, environment={"DS_AMP_LEVEL": "O0"})
    'O2'
    """
    environment = os.environ if environment is None else environment
    said = (
        ("level", level),
        (CONFIG_KEY, (settings or {}).get(CONFIG_KEY)),
        (ENVIRONMENT_VARIABLE, environment.get(ENVIRONMENT_VARIABLE) or None),
    )
    for source, value in said:
        if value is not None:
            return _check(value, source)
    return DEFAULT


def _check(value: Any, source: str) -> Level:
    if value not in get_args(Level):
        raise ConfigError(explain_unknown(source, str(value), get_args(Level)))
    return value  # type: ignore[no-any-return]
