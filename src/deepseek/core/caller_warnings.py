"""Warnings that point at the user's own line, however deep inside the house the reason was found.

Loading passes through many functions, and a warning that names one of ours helps nobody; Python also shows a warning
once for each place, so that the same notice at two calls of a user is shown twice.
"""

from __future__ import annotations

import sys
import warnings

_HOUSE = __name__.partition(".")[0]


def warn_caller(message: str) -> None:
    """Warn with `message` at the nearest line outside deepseek."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module == _HOUSE or module.startswith(f"{_HOUSE}.")
