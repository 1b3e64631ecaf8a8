"""Layers: all of `torch.nn`, and beside them our own, each loaded when it is first touched.

A name that both have, like `attention`, is ours.

    from deepseek import nn
    nn.Linear, nn.ReLU          # torch's
    nn.MoERouter, nn.Int8Linear # ours
"""

from __future__ import annotations

import importlib
from typing import Any

_OWN = {
    "Attention": "attention",
    "SwiGLU": "feedforward",
    "MLP": "feedforward",
    "KVCache": "kv_cache",
    "MaskConfig": "masks",
    "MoEConfig": "moe",
    "MoERouter": "moe",
    "SwiGLUExperts": "moe",
    "Int8Linear": "quantized",
    "Int8Embedding": "quantized",
    "Int8Experts": "quantized",
    "fast_sigmoid": "functional",
    "clip_grad_norm_": "utils",
}


def __getattr__(name: str) -> Any:
    if name in _OWN:
        return getattr(importlib.import_module(f"deepseek.nn.{_OWN[name]}"), name)
    if name in _OWN.values():
        return importlib.import_module(f"deepseek.nn.{name}")
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("torch.nn"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OWN, *dir(importlib.import_module("torch.nn"))})
