"""The feed-forward blocks of decoders: gated with SiLU (Llama) or GELU (Gemma), and plain (GPT-2).

Shapes: (..., D) in, (..., D) out, F inside. Cost: 3DF multiply-adds a token for the gated one and 2DF for the plain,
and twice that again for the backward pass.
Sources: Shazeer 2020, "GLU Variants Improve Transformer", equation 6; Radford et al. 2019.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, ffn_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=bias)
        self.gate_up_proj: nn.Module | None = None  # both in one, in a packed model

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self._gate_and_up(x)
        y: Tensor = self.down_proj(self.activate(gate) * up)
        return y

    def activate(self, gate: Tensor) -> Tensor:
        """Apply the gate's activation."""
        return F.silu(gate)

    def _gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.gate_up_proj is None:
            return self.gate_proj(x), self.up_proj(x)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up


class GeGLU(SwiGLU):
    """`down(gelu(gate(x)) * up(x))` with the tanh approximation that Gemma was trained with."""

    def activate(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")


class MLP(nn.Module):
    """`down(gelu(up(x)))` with the tanh approximation that GPT-2 was trained with."""

    def __init__(self, hidden_size: int, ffn_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return y
