"""The tasks by name. Each is a file here with one class, and a class of settings in `task_settings.py`."""

from __future__ import annotations

import importlib

from deepseek.core.registry import Registry
from deepseek.train.task import Task

TASKS: Registry[str] = Registry("task")
"""Name of a task -> file and class, which are imported on first use."""
TASKS.add("causal_lm", "causal_lm:CausalLM")


def find_task(kind: str) -> type[Task]:
    """Return the class of the task `kind`; raises `ConfigError` for an unknown one.

    >>> find_task("causal_lm").unit
    'tokens'
    """
    file, _, name = TASKS[kind].partition(":")
    found: type[Task] = getattr(importlib.import_module(f"{__name__}.{file}"), name)
    return found
