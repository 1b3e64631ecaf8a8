"""What the tests of conversions share."""

from __future__ import annotations

import torch

FAMILIES = ["gpt2", "bert", "llama", "mixtral", "resnet"]


LOSSLESS = ["1.0", "1.3", "2.0", "2.3", "3.0", "3.1", "3.5", "4.0"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return set(a) == set(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


AT = "layers.0.self_attn."


def llama_attention() -> dict[str, torch.Tensor]:
    return {f"{AT}{each}_proj.weight": torch.ones(2, 2) for each in "qkvo"}
