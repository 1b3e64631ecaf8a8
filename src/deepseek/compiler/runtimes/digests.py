"""A model as one number: the same for the same weights in the same structure, in every process.

Decisions are remembered under it, so it must change whenever speed or answers could: with a weight, a shape, a layer's
settings, or the code of a forward pass. Cost: one read of the weights, about 1 GB/s.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def digest_model(model: nn.Module) -> str:
    """Hex SHA-256 of structure, settings, code and weights of `model`.

    >>> digest_model(nn.ReLU()) == digest_model(nn.ReLU()), digest_model(nn.ReLU()) == digest_model(nn.ReLU6())
    (True, False)
    """
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        digest.update(f"{path}|{type(module).__module__}.{type(module).__qualname__}|{module.extra_repr()}|".encode())
        digest.update(_code(module))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _code(module: nn.Module) -> bytes:
    """Return the compiled forward pass, without line numbers; nothing for one that is not Python."""
    code = getattr(type(module).forward, "__code__", None)
    return b"" if code is None else code.co_code + repr(code.co_names).encode()


def _bytes(tensor: Tensor) -> Any:
    """Return the bytes that the hash reads; a view, so that large weights are not copied."""
    if tensor.is_meta:
        return b"meta"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
