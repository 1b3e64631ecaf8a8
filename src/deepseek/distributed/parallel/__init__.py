"""Plans made to run: models cut from outside over tensor, pipeline, expert and data parallel ranks.

`ds.parallelize` finds the rows of a model and does all of it; what it is made of is here, loaded when it is touched.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "build_mesh": "mesh",
    "PlanMesh": "mesh",
    "SequenceRing": "sequence_ring",
    "ModelParts": "legality",
    "ModelRows": "parallel_model",
    "ParallelModel": "parallel_model",
    "cut": "parallel_model",
    "PipelineStage": "pipeline",
    "compare_steps": "parity",
    "record_steps": "parity",
    "measure_layers": "layer_costs",
    "split_layers": "layer_costs",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"deepseek.distributed.parallel.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
