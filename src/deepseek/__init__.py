"""One PyTorch-native framework that takes a model from training, through compression, to serving.

    import deepseek as ds

Importing it defines names and does nothing else: a public name is loaded when it is first touched, and torch with the
first one that needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it. A module's own name stands for the module itself.
_PUBLIC = {
    "Linear": "torch.nn",
    "ReLU": "torch.nn",
    "VersionAdapter": "deepseek.compat.version_adapter",
    "VersionConverter": "deepseek.compat.version_converter",
    "get_version_info": "deepseek.compat.compatibility",
    "profile": "deepseek.compat.generations",
    "MoERouter": "deepseek.nn.moe",
    "prepare": "deepseek.train.own_loop",
    "plan": "deepseek.planning.search.planner",
    "Plan": "deepseek.distributed.plan",
    "comm_overlap": "deepseek.distributed.overlap",
    "parallelize": "deepseek.models.parallelizing",
    "load_model": "deepseek.models.loading",
    "save_model": "deepseek.models.loading",
    "quantize": "deepseek.compress.quantizing",
    "BackendSelector": "deepseek.compiler.runtimes.selection_policy",
    "fast_sigmoid": "deepseek.nn.functional",
    "PrecisionManager": "deepseek.mixed_precision.manager",
    "jit": "deepseek.compiler.jit.decorator",
    "dynamic_graph": "deepseek.compiler.dynamic_shapes.dynamic_graph",
}
_MODULES = (
    "artifact",
    "checkpoint",
    "compat",
    "compiler",
    "compress",
    "core",
    "data",
    "distributed",
    "mixed_precision",
    "models",
    "nn",
    "onnx",
    "optim",
    "planning",
    "recipes",
    "serve",
    "train",
)

__all__ = ["__version__", *_PUBLIC, *_MODULES]  # noqa: PLE0604 - strings, one by one


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"deepseek.{name}")
    else:
        raise AttributeError(f"module 'deepseek' has no attribute {name!r}; it offers {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
