"""Which earlier tokens a token may look at: the dynamic local/global attention mask.

Some heads are global: they see every earlier token. The others are local: they always see the last `local_distance`
tokens, and how much they see beyond is decided by the content, one number per token and head,

    bias[q, k] = 0                                  where q - k <= local_distance
    bias[q, k] = openness * log sigmoid(gate(x_q))  where q - k >  local_distance

added to the attention scores. A gate near one makes the head global for that token, near zero makes it local.
`openness` grows from 0 to 1 over the first steps of training, so that every head starts global and learns where to
close; once trained it is 1. Without a gate the far bias is minus infinity, which is plain sliding-window attention.

Shapes: B batch, N heads, T query tokens, S key positions. Cost: one (B, N, T, S) bias, so attention runs on the
general kernel instead of the causal one; at the lengths this is meant for the matrix products outweigh it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.core.config import Config
from pydantic import Field


class MaskConfig(Config):
    """The dynamic local/global mask; a decoder without one is plain causal."""

    local_distance: int = Field(default=5, ge=1)
    """How many tokens back a local head always sees, in tokens."""
    local_heads: float = Field(default=0.5, ge=0, le=1)
    """Share of each masked layer's heads that are local, from 0 (none) to 1 (all)."""
    global_layer_every: int = Field(default=0, ge=0)
    """Every n-th layer is wholly global; 0 for none."""
    is_dynamic: bool = True
    """Whether the content of a token can open a local head; otherwise the window is hard."""
    opening_steps: int = Field(default=0, ge=0)
    """Training steps over which local heads close from wholly global to what their gates say."""

    def num_local_heads(self, num_heads: int, layer: int) -> int:
        """Local heads of `layer` (counted from 0)."""
        is_global = self.global_layer_every and (layer + 1) % self.global_layer_every == 0
        return 0 if is_global else round(self.local_heads * num_heads)

    def openness_at(self, step: int) -> float:
        """Weight of the gates at a training step, from 0 to 1."""
        return min(1.0, step / self.opening_steps) if self.opening_steps else 1.0


def causal_mask(positions_BT: Tensor, num_keys: int) -> Tensor:
    """(B, 1, T, S) bool: a token at position p sees keys 0 to p."""
    keys_S = torch.arange(num_keys, device=positions_BT.device)
    return (keys_S <= positions_BT[..., None])[:, None]


def far_mask(positions_BT: Tensor, num_keys: int, local_distance: int) -> Tensor:
    """(B, 1, T, S) bool: keys that lie more than `local_distance` tokens back."""
    keys_S = torch.arange(num_keys, device=positions_BT.device)
    return (positions_BT[..., None] - keys_S > local_distance)[:, None]
