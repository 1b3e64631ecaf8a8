"""A layer is plain only while nothing was put on or into it."""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.nn.utils import parametrizations

from deepseek.nn.plain_linear import has_hooks, is_plain_linear, matmul_dtype


def test_whatever_changes_a_layer_makes_it_no_plain_one() -> None:
    layer = nn.Linear(2, 2)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook, layer.register_full_backward_hook):
        handle = register(lambda *_: None)
        assert has_hooks(layer) and not is_plain_linear(layer)
        handle.remove()
        assert is_plain_linear(layer)
    layer.forward = types.MethodType(nn.Linear.forward, layer)  # type: ignore[method-assign]
    assert not is_plain_linear(layer)
    assert not is_plain_linear(parametrizations.weight_norm(nn.Linear(2, 2)))


def test_float64_stays_what_it_is_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul_dtype(torch.ones(1)) == nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype
        assert matmul_dtype(torch.ones(1).double()) == torch.float64
