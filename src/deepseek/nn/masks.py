"""Which earlier tokens a token may look at: the dynamic local/global attention mask.

Some heads are global: they see every earlier token. The others are local: they always see the last `local_distance`
tokens, and how much they see beyond is decided by the content, one number per token and head,

    bias[q, k] = 0                                  where q - k <= local_distance
    bias[q, k] = openness * log sigmoid(gate(x_q))  where q - k >  local_distance

added to the attention scores. A gate near one makes the head global for that token, near zero makes it local.
`openness` grows from 0 to 1 over the first steps of training, so that every head starts global and learns where to
close; once trained it is 1. Without a gate the far bias is minus infinity, which is plain sliding-window attention.

Rows may hold several documents, which do not see each other: what is not in a token's own document is hidden from it as
the future is, whatever else cuts its view.

Shapes: B batch, N heads, T query tokens, S key positions. Cost: one (B, N, T, S) bias, so attention runs on the
general kernel instead of the causal one; at the lengths this is meant for the matmuls outweigh it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from deepseek.core.config import Config


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
        """Return the weight of the gates at a training step, from 0 to 1."""
        return min(1.0, step / self.opening_steps) if self.opening_steps else 1.0


@dataclass(frozen=True)
class Visibility:
    """Which keys the queries of one forward pass may see; made once, read by every layer."""

    positions_BT: Tensor
    """Position of each query token (B may be 1)."""
    causal_B1TS: Tensor | None
    """True where a key is not in the future; `None` for a whole sequence, which is causal by itself."""
    far_B1TS: Tensor | None
    """True where a key lies beyond the local distance; `None` for a decoder without local heads."""
    openness: Tensor | None
    """() weight of the gates; `None` for a decoder without local heads."""
    window_B1TS: Tensor | None = None
    """`causal_B1TS` cut to a sliding window; `None` where no query is farther from a key than that."""
    has_documents: bool = False
    """Whether `causal_B1TS` also hides other documents of the row."""

    def hard_mask(self, num_heads: int, num_local_heads: int) -> Tensor:
        """(B, N, T, S) bool, True where a head may look: local heads, which come first, stay within their distance."""
        assert self.causal_B1TS is not None and self.far_B1TS is not None
        near_B1TS = self.causal_B1TS & ~self.far_B1TS
        local_BNTS = near_B1TS.expand(-1, num_local_heads, -1, -1)
        return torch.cat((local_BNTS, self.causal_B1TS.expand(-1, num_heads - num_local_heads, -1, -1)), dim=1)

    def far_bias(self, gate_BTN: Tensor) -> Tensor:
        """(B, N, T) what the gates of local heads add to the scores of far keys, in at least float32."""
        assert self.openness is not None
        wide_BTN = gate_BTN.to(torch.promote_types(gate_BTN.dtype, torch.float32))
        return (F.logsigmoid(wide_BTN) * self.openness).transpose(1, 2)

    def soft_mask(self, num_heads: int, gate_BTN: Tensor) -> Tensor:
        """(B, N, T, S) additive bias, of at least float32, from the gates of the local heads, which come first."""
        assert self.causal_B1TS is not None and self.far_B1TS is not None
        batch, _, num_local_heads = gate_BTN.shape
        far_bias_BNT1 = self.far_bias(gate_BTN)[..., None]
        bias_BNTS = torch.where(self.far_B1TS, far_bias_BNT1, 0.0)
        global_BNTS = bias_BNTS.new_zeros(()).expand(batch, num_heads - num_local_heads, *bias_BNTS.shape[2:])
        return torch.cat((bias_BNTS, global_BNTS), dim=1).masked_fill(~self.causal_B1TS, -torch.inf)


def see(
    positions_BT: Tensor,
    num_keys: int,
    *,
    is_whole: bool,
    local_distance: int | None,
    openness: Tensor | None,
    window: int | None = None,
    documents_BT: Tensor | None = None,
) -> Visibility:
    """Build the `Visibility` of queries at `positions_BT` over `num_keys` keys.

    `is_whole` says that queries and keys are the same tokens, each of which then sees itself and those before it
    whatever its position is called; `local_distance` is `None` for a decoder without local heads, which then needs no
    mask at all. `window` is how many tokens the layers with a sliding window see, the token itself among them.
    `documents_BT` says which document of its row each token of a whole pass belongs to; none is one document a row.
    """
    has_window = window is not None and num_keys > window
    has_documents = documents_BT is not None
    if is_whole and local_distance is None and not has_window and not has_documents:
        return Visibility(positions_BT, None, None, None)
    keys_S = torch.arange(num_keys, device=positions_BT.device)
    distance_BTS = (keys_S[None] if is_whole else positions_BT)[..., None] - keys_S
    far_B1TS = None if local_distance is None else (distance_BTS > local_distance)[:, None]
    causal_B1TS = (distance_BTS >= 0)[:, None]
    if documents_BT is not None:
        causal_B1TS = causal_B1TS & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    window_B1TS = causal_B1TS & (distance_BTS < window)[:, None] if window is not None and has_window else None
    if is_whole and local_distance is None and not has_documents:
        # Layers without a window keep the kernel's own causal mask.
        return Visibility(positions_BT, None, None, None, window_B1TS)
    return Visibility(positions_BT, causal_B1TS, far_B1TS, openness, window_B1TS, has_documents)


def count_positions(documents_BT: Tensor) -> Tensor:
    """Return the (B, T) positions of tokens in their documents, which lie in a row one after the other.

    >>> count_positions(torch.tensor([[0, 0, 0, 1, 1, 5]]))
    tensor([[0, 1, 2, 0, 1, 0]])
    """
    indices_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return indices_T - torch.where(is_first_BT, indices_T, 0).cummax(dim=1).values


def count_lengths(documents_BT: Tensor) -> Tensor:
    """Return for each of (B, T) tokens how many tokens its document has.

    >>> count_lengths(torch.tensor([[0, 0, 0, 1, 1, 5]]))
    tensor([[3, 3, 3, 2, 2, 1]])
    """
    return count_positions(documents_BT) + count_positions(documents_BT.flip(1)).flip(1) + 1
