"""Rotary position embedding: each pair of channels is rotated by an angle that grows with the position.

The table of cosines and sines is made once, in float32, and indexed with positions, so that training, prefill and
decoding of sequences at different positions share it. Halves are paired (channel i with i + H/2), as in Hugging Face's
Llama layout, so weights move between the two without a permutation.

Shapes: B batch, T tokens, N heads, H head size (even).
Source: Su et al. 2021, "RoFormer", equation 34. Cost: two multiplications and one addition per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(length: int, head_size: int, *, theta: float) -> Tensor:
    """Return (2, length, head_size) float32, cosines first, then sines; `theta` is the longest wavelength over 2 pi."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.arange(length, dtype=torch.float64)[:, None] * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x_BTNH: Tensor, table_2BTH: Tensor) -> Tensor:
    """Rotate every head by its position's angle; the table is already indexed by position (B may be 1)."""
    cos, sin = table_2BTH.to(x_BTNH.dtype).unsqueeze(3).unbind(0)
    left, right = x_BTNH.chunk(2, dim=-1)
    return x_BTNH * cos + torch.cat((-right, left), dim=-1) * sin
