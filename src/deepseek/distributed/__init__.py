"""What moves bytes between ranks, and who holds what: the communicator, collectives as values, plans as values.

from deepseek.distributed import DeepSeekComm

comm = DeepSeekComm.init()
comm.all_reduce(gradient)
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "DeepSeekComm": "communicator",
    "average_gradients": "gradient_reduction",
    "average_shards": "gradient_reduction",
    "comm_overlap": "overlap",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
