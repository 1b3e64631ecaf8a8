"""Serving: an engine that generates for several requests at once, and the HTTP server around it.

from deepseek.serve import Engine, running_server
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Engine": "engine",
    "EngineConfig": "config",
    "Sampling": "sequences",
    "ServeConfig": "config",
    "running_server": "server",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
