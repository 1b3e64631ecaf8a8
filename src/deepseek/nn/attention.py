"""Grouped-query attention with rotary positions, an optional KV cache and the optional local/global mask.

One module covers multi-head attention (`num_kv_heads == num_heads`), grouped-query and multi-query attention. The
matmuls and the softmax are torch's `scaled_dot_product_attention`, which picks the fused kernel where the mask
allows it: plain causal attention always, the content-dependent mask when it needs no gradient.

Shapes: B batch, T tokens, D hidden, N query heads, K key/value heads, H head size, S key positions.
Sources: Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.nn.kv_cache import LayerCache
from deepseek.nn.masks import Visibility
from deepseek.nn.rotary import rotate


class Attention(nn.Module):
    """Causal self-attention.

    `num_local_heads` of the heads are local with a gate each where `is_dynamic`; with `has_window`, all of them see the
    last tokens only. Scores are multiplied by `scale` (none is head_size**-0.5) and, with a `softcap`, bent to stay
    within it. `q_norm` and `k_norm` are over each head's channels.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        bias: bool = False,
        output_bias: bool = False,
        num_local_heads: int = 0,
        is_dynamic: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        has_window: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.num_local_heads = num_local_heads
        self.scale = scale
        self.softcap = softcap
        self.has_window = has_window
        self.q_proj = nn.Linear(hidden_size, num_heads * head_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_size, bias=bias)
        self.qkv_proj: nn.Module | None = None  # all three in one, in a packed model
        self.o_proj = nn.Linear(num_heads * head_size, hidden_size, bias=output_bias)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.far_gate = nn.Linear(hidden_size, num_local_heads) if num_local_heads and is_dynamic else None

    def forward(
        self,
        x_BTD: Tensor,
        table_2BTH: Tensor | None,
        visibility: Visibility,
        cache: LayerCache | None = None,
    ) -> Tensor:
        batch, length, _ = x_BTD.shape
        qkv_BTMH = self._project(x_BTD).view(batch, length, -1, self.head_size)
        qk_BTMH, v_BTKH = qkv_BTMH.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = qk_BTMH.split((self.num_heads, self.num_kv_heads), dim=2)
            qk_BTMH = torch.cat((self.q_norm(q_BTNH), self.k_norm(k_BTKH)), dim=2)
        if table_2BTH is not None:
            qk_BTMH = rotate(qk_BTMH, table_2BTH)
        q_BTNH, k_BTKH = qk_BTMH.split((self.num_heads, self.num_kv_heads), dim=2)
        if cache is None:
            k_BKSH, v_BKSH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        else:
            k_BKSH, v_BKSH = cache.write(k_BTKH, v_BTKH, visibility.positions_BT)
        y_BNTH = self._attend(x_BTD, q_BTNH.transpose(1, 2), k_BKSH, v_BKSH, visibility)
        y_BTD: Tensor = self.o_proj(y_BNTH.transpose(1, 2).reshape(batch, length, -1))
        return y_BTD

    def _project(self, x_BTD: Tensor) -> Tensor:
        """(B, T, (N + 2K) H): queries, keys and values of all heads, side by side."""
        if self.qkv_proj is None:
            return torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), dim=-1)
        qkv: Tensor = self.qkv_proj(x_BTD)
        return qkv

    def _attend(self, x_BTD: Tensor, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, visibility: Visibility) -> Tensor:
        k_BKSH, v_BKSH = k_BKSH.to(q_BNTH.dtype), v_BKSH.to(q_BNTH.dtype)
        if self.far_gate is not None and torch.is_grad_enabled():
            bias_BNTS = visibility.soft_mask(self.num_heads, self.far_gate(x_BTD))
            return attend_with_bias(q_BNTH, k_BKSH, v_BKSH, bias_BNTS, scale=self.scale, softcap=self.softcap)
        mask = self._mask(x_BTD, visibility, q_BNTH.dtype)
        is_plain = mask is None or visibility.has_documents
        if self.softcap is not None or (is_plain and _is_slow_when_fused(q_BNTH)):
            bias = causal_bias(q_BNTH) if mask is None else as_bias(mask, q_BNTH.dtype)
            return attend_with_bias(q_BNTH, k_BKSH, v_BKSH, bias, scale=self.scale, softcap=self.softcap)
        return F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )

    def _mask(self, x_BTD: Tensor, visibility: Visibility, dtype: torch.dtype) -> Tensor | None:
        """Return what SDPA adds to the scores; `None` is the causal kernel's own mask."""
        if self.has_window and visibility.window_B1TS is not None:
            return visibility.window_B1TS
        if self.num_local_heads == 0:
            return visibility.causal_B1TS
        if self.far_gate is None:
            return visibility.hard_mask(self.num_heads, self.num_local_heads)
        gate_BTN = self.far_gate(x_BTD)
        return visibility.soft_mask(self.num_heads, gate_BTN).to(dtype)


def attend_with_bias(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    bias_BNTS: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention step by step, for what the fused kernel cannot do or does slower.

    That is a bias that needs a gradient, short sequences in bf16 on a CPU, and a `softcap`: scores that are bent to
    softcap * tanh(scores / softcap).

    Everything is stored in the inputs' dtype; matmuls and softmax accumulate in float32 inside their kernels. torch's
    own fallback for such a bias widens the inputs instead, which costs a CPU with bf16 instructions a factor of four.
    """
    group_size = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = (shared.repeat_interleave(group_size, dim=1) for shared in (k_BKSH, v_BKSH))
    scores_BNTS = (q_BNTH * (q_BNTH.shape[-1] ** -0.5 if scale is None else scale)) @ k_BNSH.transpose(2, 3)
    if softcap is not None:
        scores_BNTS = softcap * (scores_BNTS / softcap).tanh()
    weights_BNTS = (scores_BNTS + bias_BNTS.to(scores_BNTS.dtype)).softmax(dim=-1)
    y_BNTH: Tensor = weights_BNTS.to(v_BNSH.dtype) @ v_BNSH
    return y_BNTH


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to scores: bool ones are true where a key is seen, others are biases already."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def causal_bias(q_BNTH: Tensor) -> Tensor:
    """Return the (T, T) bias that hides the future."""
    length = q_BNTH.shape[2]
    return torch.full((length, length), -torch.inf, dtype=q_BNTH.dtype, device=q_BNTH.device).triu(1)


def _is_slow_when_fused(q_BNTH: Tensor) -> bool:
    """Return whether the fused kernel loses: 6 heads on 8 x 256 tokens in bf16 take 18 ms fused and 7 written out."""
    return (
        torch.is_grad_enabled()
        and q_BNTH.device.type == "cpu"
        and q_BNTH.dtype == torch.bfloat16
        and q_BNTH.shape[2] <= _LONGEST_WRITTEN_OUT
    )


_LONGEST_WRITTEN_OUT = 512
