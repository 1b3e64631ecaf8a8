"""Weights laid out for the kernels of this machine, for models that only run.

    model = load_model(folder, packed=True)     # or pack_(model)

Two changes, neither of which changes what is computed. Layers that read the same input become one (queries, keys and
values; the gate and the up projection), so that each call does more work. And every linear layer's weights go into the
blocked order of oneDNN, which reads them several times faster than the row order: one token through a 3072 x 576
layer takes 156 us instead of 344 in FP32 and 62 instead of 113 in bf16, 256 tokens 1.7 ms instead of 4.8 (weights in
main memory, two Zen 4 cores). Where oneDNN is not built in, or has no kernels of
a dtype on this processor, layers stay as they are.

A packed model has no weights of its own any more: it can be run, and not trained, saved or moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.nn.attention import Attention
from deepseek.nn.feedforward import SwiGLU
from deepseek.nn.lora import LoRALinear
from deepseek.nn.moe import SwiGLUExperts
from deepseek.nn.quantized import Int8Linear

# Rows that the blocks are laid out for; measured the best of 1, 4, 8 and 16 for one row and for 256 alike.
_TYPICAL_ROWS = 8


class PackedLinear(nn.Module):
    """A linear layer over weights in oneDNN's order, in the dtype they had."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class PackedExperts(nn.Module):
    """The experts of `SwiGLUExperts` as packed layers, gate and up projection in one."""

    def __init__(self, experts: SwiGLUExperts) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        gate_up_EOI = torch.cat((experts.gate_proj, experts.up_proj), dim=2).transpose(1, 2)
        self.gate_up = nn.ModuleList(pack_linear(_as_linear(weight)) for weight in gate_up_EOI)
        self.down = nn.ModuleList(pack_linear(_as_linear(weight)) for weight in experts.down_proj.transpose(1, 2))

    def run(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Each expert on its own group, (n, D) each; empty groups cost nothing."""
        return [self._answer(index, x_nD) if len(x_nD) else x_nD for index, x_nD in enumerate(groups)]

    def _answer(self, expert: int, x_nD: Tensor) -> Tensor:
        gate, up = self.gate_up[expert](x_nD).chunk(2, dim=-1)
        y_nD: Tensor = self.down[expert](F.silu(gate) * up)
        return y_nD


M = TypeVar("M", bound=nn.Module)


def pack_(model: M) -> M:
    """Merge and pack the layers of `model` in place, and return it; what is packed already stays."""
    for module in model.modules():
        if any(isinstance(child, LoRALinear) for child in module.children()):
            continue  # each has a correction of its own
        if isinstance(module, Attention) and module.qkv_proj is None:
            module.qkv_proj = merge([module.q_proj, module.k_proj, module.v_proj])
            del module.q_proj, module.k_proj, module.v_proj
        elif isinstance(module, SwiGLU) and module.gate_up_proj is None:
            module.gate_up_proj = merge([module.gate_proj, module.up_proj])
            del module.gate_proj, module.up_proj
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), name, pack_linear(module))
        elif isinstance(module, SwiGLUExperts):
            setattr(model.get_submodule(parent), name, PackedExperts(module))
    return model


def pack_linear(linear: nn.Linear) -> nn.Module:
    """Return the packed layer, or `linear` itself where packing is not available or not worth it."""
    return PackedLinear(linear) if _can_pack(linear) else linear


def _as_linear(weight_OI: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
    return linear


def merge(layers: Sequence[nn.Module]) -> nn.Module:
    """Return one layer whose output is the outputs of `layers`, one after the other; all float or all int8."""
    merged: nn.Module
    if all(isinstance(layer, Int8Linear) for layer in layers):
        weight = torch.cat([layer.get_buffer("weight") for layer in layers])
        merged = Int8Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None)
        merged.weight, merged.weight_scale = weight, torch.cat([layer.get_buffer("weight_scale") for layer in layers])
        if layers[0].bias is not None:
            merged.bias = torch.cat([layer.get_buffer("bias") for layer in layers])
    else:
        merged = _as_linear(torch.cat([layer.get_parameter("weight") for layer in layers]))
        if layers[0].bias is not None:
            merged.bias = nn.Parameter(torch.cat([layer.get_parameter("bias").detach() for layer in layers]))
    return merged


def _can_pack(linear: nn.Linear) -> bool:
    """oneDNN takes these; a router's handful of rows is not worth it, and its weight is read by name."""
    return (
        torch.backends.mkldnn.is_available()
        and linear.weight.device.type == "cpu"
        and _has_kernels(linear.weight.dtype)
        and linear.out_features >= _SMALLEST
    )


def _has_kernels(dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes in `dtype` on this processor; in bf16 it does not without AVX-512."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


_SMALLEST = 64
