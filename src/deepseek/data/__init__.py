"""Data in, batches out: text (sources, tokenizing, the token cache, batching) and samples loaded one by one."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"SampleLoader": "samples", "SampleSource": "samples", "BrokenSampleError": "samples"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
