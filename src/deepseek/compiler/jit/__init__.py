"""`@ds.jit`: Python with control flow on tensor values becomes one graph.

decorator.py    what users call
rewriting/      source -> syntax tree -> calls of operators that decide at run time
tracing/        what those operators do while the graph is traced
backend.py      a captured graph, optimized and compiled
explanation.py  what `explain()` says
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"jit": "decorator", "ControlFlowError": "tracing.sites", "GraphBreakWarning": "tracing.sites"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
