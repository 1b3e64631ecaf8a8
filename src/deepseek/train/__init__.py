"""Training: the loop that yields events, and `prepare` for those who keep their own loop.

from deepseek.train import TrainConfig, train

for event in train(TrainConfig(num_steps=100)):
    print(event)
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"train": "loop", "TrainConfig": "config", "prepare": "own_loop", "Task": "task", "TaskData": "task"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
