"""Which dtype each matmul runs in: policies, levels, loss scaling, and precision chosen layer by layer.

    from deepseek.mixed_precision import DynamicPrecision, GradScaler, PrecisionManager

Each name is loaded when it is first touched.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "DynamicPrecision": "dynamic",
    "GradScaler": "loss_scaling",
    "PrecisionManager": "manager",
    "choose_level": "amp_levels",
    "choose_precision": "forward_precision",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
