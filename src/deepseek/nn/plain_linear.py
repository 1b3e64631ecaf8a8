"""Whether a layer computes x W^T + b and nothing else, so that who knows W and b may compute it in another way.

Asked before a loss or an adapter goes around a layer's call. A layer that something was put on or into is called as
usual: an adapter, small weights and compiled or traced code are other classes, a precision of its own replaces
`forward`, tensor parallelism and sampled statistics hang hooks on it, and sharded weights are no plain parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether `layer` is a linear layer without hooks, adapters or a `forward` of its own.

    >>> is_plain_linear(nn.Linear(2, 2)), is_plain_linear(nn.Identity())
    (True, False)
    """
    is_usual = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    return is_usual and "forward" not in vars(layer) and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a hook watches or changes what goes through `module`.

    >>> has_hooks(nn.Identity())
    False
    """
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return what a linear layer computes in here for an input `x`: its own dtype, or what autocast makes of it.

    >>> matmul_dtype(torch.ones(1)), matmul_dtype(torch.ones(1, dtype=torch.double))
    (torch.float32, torch.float64)
    """
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
