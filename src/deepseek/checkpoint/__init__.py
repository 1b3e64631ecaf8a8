"""Checkpoints of a run on disk, and `checkpoint` itself: activation checkpointing as a decorator.

The name means two things in this field, so the module can be called:

    import deepseek as ds

    @ds.checkpoint                      # activations: recompute in the backward pass (checkpoint/activations.py)
    def forward(self, x): ...

    from deepseek.checkpoint.saving import save     # a run's state on disk

Calling loads torch; importing the module does not.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

_PUBLIC = {"checkpoint_blocks_": "activations", "checkpoint_within_budget_": "activation_budget"}


class _CallableModule(types.ModuleType):
    """A module that is a decorator, too; Python looks `__call__` up in the class."""

    def __call__(self, target: Any = None, /, **settings: Any) -> Any:
        """`activations.checkpoint`."""
        return importlib.import_module(f"{__name__}.activations").checkpoint(target, **settings)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


sys.modules[__name__].__class__ = _CallableModule
