"""Layers that hold their weights in 8 bits and compute in 8 bits: what an int8 model is made of.

Weights are symmetric int8 with one scale per output channel. Activations are quantized on the way in, one scale per
token, so that a token's result never depends on what shares its batch. The matmul is FBGEMM's, called through torch;
it is the fastest there is here in eager mode: a 1536 x 576 layer answers one token in 23 us against 46 in FP32 and 63
in bf16, and 64 tokens in 195 us against 641, where torch's weight-only int8 kernel takes 13 and 345
(AVX-512 VNNI, 2 cores). Where FBGEMM is not built in, or off the CPU, weights are widened on the fly instead.

FBGEMM adds pairs of products in 16 bits where the CPU lacks the VNNI instructions, and a large pair saturates without a
word (FBGEMM issue 125). There, activations take 7 bits instead of 8, with which no pair can.

Shapes: N outputs, K inputs, E experts, D hidden, F ffn. Error: about 1 % of the output's norm per layer. Memory: the
weights twice after the first pass, as they are stored and as FBGEMM reads them.
Source: Jacob et al. 2018, section 2; scales per row of activations as in Yao et al. 2022 ("ZeroQuant").
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.nn.moe import SwiGLUExperts

_LEVELS = 127
_SMALLEST = 1e-30


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values and float32 scales, one per slice along the last dim: (..., N, K) to (..., N, K) and (..., N).

    >>> values, scales = quantize_rows(torch.tensor([[1.0, -0.5]]))
    >>> values.tolist(), round(scales.item() * 127, 4)
    ([[127, -64]], 1.0)
    """
    scales = weight.detach().float().abs().amax(dim=-1).clamp_min(_SMALLEST) / _LEVELS
    values = (weight.detach().float() / scales[..., None]).round().clamp(-_LEVELS, _LEVELS)
    return values.to(torch.int8), scales


class Int8Linear(nn.Module):
    """A linear layer over int8 weights; float32 or bfloat16 in, the same out."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._packed: Any = None

    @classmethod
    def from_float(cls, linear: nn.Linear) -> Int8Linear:
        """Quantize a float layer."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.weight_scale = quantize_rows(linear.weight)
        layer.bias = None if linear.bias is None else linear.bias.detach().float()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = self._multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        if not _has_fbgemm(x.device):
            return F.linear(x, self.weight.to(x.dtype)) * self.weight_scale.to(x.dtype)
        if self._packed is None:
            self._packed = _pack(self.weight, self.weight_scale)
        if x.requires_grad and torch.is_grad_enabled():
            return _multiply_with_gradient(x, self.weight, self.weight_scale, self._packed)
        return multiply_int8(x, self._packed)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Packed weights live in the library's own memory; a copy packs again."""
        return vars(self) | {"_packed": None}


class Int8Embedding(nn.Module):
    """An embedding over int8 rows, one scale each; the rows come out in float32."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(num_embeddings))

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> Int8Embedding:
        """Quantize a float table."""
        layer = cls(embedding.num_embeddings, embedding.embedding_dim)
        layer.weight, layer.weight_scale = quantize_rows(embedding.weight)
        return layer

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens] * self.weight_scale[tokens][..., None]


class Int8Experts(nn.Module):
    """The experts of `SwiGLUExperts` over int8 weights, stored as (E, outputs, inputs); for inference."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        for name, shape in _expert_shapes(hidden_size, ffn_size).items():
            self.register_buffer(name, torch.zeros(num_experts, *shape, dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.ones(num_experts, shape[0]))
        self._packed: dict[tuple[str, ...], list[Any]] = {}

    @classmethod
    def from_float(cls, experts: SwiGLUExperts) -> Int8Experts:
        """Quantize float experts."""
        layer = cls(experts.num_experts, *experts.gate_proj.shape[1:])
        for name, weight_EIO in experts.named_parameters():
            values, scales = quantize_rows(weight_EIO.transpose(1, 2))
            setattr(layer, name, values.contiguous())
            setattr(layer, f"{name}_scale", scales)
        return layer

    def run(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Each expert on its own group, (n, D) each; empty groups cost nothing."""
        return [self._answer(index, x_nD) if len(x_nD) else x_nD for index, x_nD in enumerate(groups)]

    def _answer(self, expert: int, x_nD: Tensor) -> Tensor:
        gate_nF, up_nF = self._multiply(("gate_proj", "up_proj"), expert, x_nD).chunk(2, dim=-1)
        return self._multiply(("down_proj",), expert, F.silu(gate_nF) * up_nF)

    def _multiply(self, names: tuple[str, ...], expert: int, x: Tensor) -> Tensor:
        """Compute the projections called `names`, side by side: one call reads x once for all of them."""
        if not _has_fbgemm(x.device):
            weight_OI, scale_O = (torch.cat(parts) for parts in zip(*self._stored(names, expert), strict=True))
            return F.linear(x, weight_OI.to(x.dtype)) * scale_O.to(x.dtype)
        if names not in self._packed:
            self._packed[names] = [
                _pack(*(torch.cat(parts) for parts in zip(*self._stored(names, index), strict=True)))
                for index in range(self.num_experts)
            ]
        packed = self._packed[names][expert]
        if x.requires_grad and torch.is_grad_enabled():
            weight_OI, scale_O = (torch.cat(parts) for parts in zip(*self._stored(names, expert), strict=True))
            return _multiply_with_gradient(x, weight_OI, scale_O, packed)
        return multiply_int8(x, packed)

    def _stored(self, names: tuple[str, ...], expert: int) -> list[tuple[Tensor, Tensor]]:
        return [(self.get_buffer(name)[expert], self.get_buffer(f"{name}_scale")[expert]) for name in names]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Packed weights live in the library's own memory; a copy packs again."""
        return vars(self) | {"_packed": {}}


def widen_(model: nn.Module) -> nn.Module:
    """Replace int8 layers of `model` by float32 ones with the values that they stand for, in place, and return it.

    What computed in 8 bits then computes in 32, so that results differ by the rounding of activations. A head that
    shares its int8 values with an embedding has weights of its own afterwards.
    """
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        layer = _to_float(module)
        if layer is not None:
            setattr(model.get_submodule(parent), name, layer)
    return model


def _to_float(module: nn.Module) -> nn.Module | None:
    """Return the float layer of an int8 one, or `None`."""
    if isinstance(module, Int8Linear):
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight = nn.Parameter(module.weight.float() * module.weight_scale[:, None])
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.clone())
        return linear
    if isinstance(module, Int8Embedding):
        values = module.weight.float() * module.weight_scale[:, None]
        return nn.Embedding(module.num_embeddings, module.embedding_dim, _weight=values)
    if isinstance(module, Int8Experts):
        num_inner, hidden_size = module.get_buffer("gate_proj").shape[1:]
        experts = SwiGLUExperts(module.num_experts, hidden_size, num_inner)
        for name, _ in list(experts.named_parameters()):
            values = module.get_buffer(name).float() * module.get_buffer(f"{name}_scale")[..., None]
            setattr(experts, name, nn.Parameter(values.transpose(1, 2).contiguous()))
        return experts
    return None


def replace_with_int8_(model: nn.Module, kept: Sequence[str]) -> None:
    """Replace linear layers, embeddings and stacked experts of `model` in place, except those whose name is `kept`.

    A name is the last part of the path: `gate` keeps every router's gate. A head that shares the embedding's weights
    shares its int8 values too.
    """
    tables: dict[int, Int8Embedding] = {}
    embeddings_first = sorted(model.named_modules(), key=lambda named: not isinstance(named[1], nn.Embedding))
    for path, module in embeddings_first:
        parent, _, name = path.rpartition(".")
        layer = None if name in kept else _to_int8(module, tables)
        if layer is not None:
            setattr(model.get_submodule(parent), name, layer)


def _to_int8(module: nn.Module, tables: dict[int, Int8Embedding]) -> nn.Module | None:
    """Return the int8 layer of `module`, or `None`; `tables` has the embeddings by their weights' ids."""
    if isinstance(module, nn.Embedding):
        table = tables[id(module.weight)] = Int8Embedding.from_float(module)
        return table
    if isinstance(module, nn.Linear):
        layer = Int8Linear.from_float(module)
        if id(module.weight) in tables:
            table = tables[id(module.weight)]
            layer.weight, layer.weight_scale = table.weight, table.weight_scale
        return layer
    return Int8Experts.from_float(module) if isinstance(module, SwiGLUExperts) else None


def multiply_int8(x: Tensor, packed: Any) -> Tensor:
    """Multiply (..., K) by packed (N, K) weights to (..., N), each row of x quantized by its own largest value."""
    if x.ndim == 1:
        return multiply_int8(x[None], packed)[0]
    scale: Tensor = torch.linalg.vector_norm(x.float(), torch.inf, dim=-1, keepdim=True).clamp_min(_SMALLEST)
    num_levels = activation_levels()
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x.float() / scale, 1 / num_levels, num_levels + 1, packed
    )
    return (y * scale).to(x.dtype)


class _Int8Product(torch.autograd.Function):
    """`multiply_int8` with a gradient for its input, as if nothing had been rounded on the way in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, scale_N: Tensor, packed: Any) -> Tensor:
        ctx.save_for_backward(weight_NK, scale_N)
        return multiply_int8(x, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight_NK, scale_N = ctx.saved_tensors
        return (grad * scale_N.to(grad.dtype)) @ weight_NK.to(grad.dtype), None, None, None


def _multiply_with_gradient(x: Tensor, weight_NK: Tensor, scale_N: Tensor, packed: Any) -> Tensor:
    y: Tensor = _Int8Product.apply(x, weight_NK, scale_N, packed)  # type: ignore[no-untyped-call]
    return y


def activation_levels() -> int:
    """Return the steps from zero to the largest activation of a token that the CPU's instructions add up exactly."""
    return 127 if torch.cpu._is_vnni_supported() else 63


def _pack(weight_NK: Tensor, scale_N: Tensor) -> Any:
    """Weights in the order in which FBGEMM's kernel reads them."""
    with warnings.catch_warnings():
        # Quantized tensors are deprecated as a way to program, and still the only way to hand weights to this kernel.
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        zeros = torch.zeros(len(scale_N), dtype=torch.long)
        values = torch._make_per_channel_quantized_tensor(weight_NK.contiguous(), scale_N.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(values, None)


def _has_fbgemm(device: torch.device) -> bool:
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def _expert_shapes(hidden_size: int, ffn_size: int) -> dict[str, tuple[int, int]]:
    return {
        "gate_proj": (ffn_size, hidden_size),
        "up_proj": (ffn_size, hidden_size),
        "down_proj": (hidden_size, ffn_size),
    }
