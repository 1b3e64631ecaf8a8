"""Rotary position embedding: each pair of channels is rotated by an angle that grows with the position.

The table of cosines and sines is made once, in float32, and indexed with positions, so that training, prefill and
decoding of sequences at different positions share it. Halves are paired (channel i with i + H/2), as in Hugging Face's
Llama layout, so weights move between the two without a permutation. A table narrower than a head leaves the channels
behind it as they are.

A model that was trained on short texts is taught longer ones by slower rotations; `RopeScaling` has the rules in use:

    linear     every rotation is `factor` times slower                         (Chen et al. 2023)
    llama3     slow rotations are, fast ones are not, and between it is blended (Llama 3.1)
    yarn       the same with a ramp over channels, and larger scores            (Peng et al. 2023)
    longrope   each pair of channels has a factor of its own                    (Ding et al. 2024)
    dynamic    beyond the original length, the longer a text the slower         (bloc97 2023, NTK-aware)

The last two depend on how long a text is: `longrope` has other factors for texts beyond the original length, whose
rows follow those for shorter texts in one table, and `dynamic` has angles for each length, which `dynamic_rows`
computes. `is_length_dependent` tells which scaling needs the length.

Shapes: B batch, T tokens, N heads, H head size (even). Cost: two multiplications and one addition per channel.
Source: Su et al. 2021, "RoFormer", equation 34.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from deepseek.core.config import Config


class RopeScaling(Config):
    """How rotations are slowed down for texts longer than those that a model was first trained on."""

    kind: Literal["linear", "llama3", "yarn", "longrope", "dynamic"]
    """The rule."""
    factor: float = Field(default=1.0, gt=0)
    """How many times slower rotations become, at most."""
    original_length: int = Field(default=8192, ge=1)
    """Longest text of the first training, in tokens."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """Rotations of less than so many turns in the original length are slowed down in full (llama3)."""
    high_frequency_factor: float = Field(default=4.0, gt=0)
    """Rotations of more than so many turns in the original length stay as they are (llama3)."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Rotations of more than so many turns in the original length stay as they are (yarn)."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Rotations of less than so many turns in the original length are slowed down in full (yarn)."""
    is_rounded: bool = True
    """Whether the ends of the ramp are rounded to whole channels (yarn)."""
    pair_factors: tuple[float, ...] = ()
    """How many times slower each pair of channels becomes (longrope)."""
    long_pair_factors: tuple[float, ...] = ()
    """The same in texts that are longer than the original length (longrope); empty where there are none."""
    amplitude: float = Field(default=1.0, gt=0)
    """Factor on cosines and sines, which makes attention sharper (yarn and longrope)."""

    @property
    def is_length_dependent(self) -> bool:
        """Whether angles depend on how long the whole text is."""
        return self.kind == "dynamic" or bool(self.long_pair_factors)


def rotary_table(length: int, head_size: int, *, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Return (2, L, head_size) float32, cosines first, then sines; `theta` is the longest wavelength over 2 pi.

    L is `length`; where `scaling` has `long_pair_factors`, `original_length` rows for shorter texts come before.
    """
    frequencies = theta ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    amplitude = scaling.amplitude if scaling else 1.0
    if scaling is None:
        return _fill_table(length, frequencies, amplitude)
    if not scaling.long_pair_factors:
        return _fill_table(length, _scale(frequencies, head_size, theta, scaling), amplitude)
    pair_factors = (scaling.pair_factors, scaling.long_pair_factors)
    short, long = (frequencies / torch.tensor(factors, dtype=torch.float64) for factors in pair_factors)
    tables = _fill_table(scaling.original_length, short, amplitude), _fill_table(length, long, amplitude)
    return torch.cat(tables, dim=1)


def dynamic_rows(
    positions_BT: Tensor, lengths: Tensor, head_size: int, *, theta: float, scaling: RopeScaling
) -> Tensor:
    """Return (2, B, T, head_size) float32 for texts that are `lengths` tokens long, by the dynamic rule.

    `lengths` are (B, 1), or (B, T) where each token has its own; both are written L below.
    """
    growth_BL = lengths.double().clamp(min=scaling.original_length) / scaling.original_length
    base_BL = theta * (scaling.factor * growth_BL - (scaling.factor - 1)) ** (head_size / max(head_size - 2, 1))
    channels = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions_BT.device)
    frequencies_BLH = base_BL[..., None] ** -(channels / head_size)
    angles_BTH = positions_BT[..., None] * frequencies_BLH
    angles_BTH = torch.cat((angles_BTH, angles_BTH), dim=-1)
    return torch.stack((angles_BTH.cos(), angles_BTH.sin())).float()


def rotate(x_BTNH: Tensor, table_2BTH: Tensor) -> Tensor:
    """Rotate every head by its position's angle; the table is already indexed by position (B may be 1)."""
    num_rotated = table_2BTH.shape[-1]
    if num_rotated < x_BTNH.shape[-1]:
        rotated = rotate(x_BTNH[..., :num_rotated], table_2BTH)
        return torch.cat((rotated, x_BTNH[..., num_rotated:]), dim=-1)
    cos, sin = table_2BTH.to(x_BTNH.dtype).unsqueeze(3).unbind(0)
    left, right = x_BTNH.chunk(2, dim=-1)
    return x_BTNH * cos + torch.cat((-right, left), dim=-1) * sin


def _fill_table(length: int, frequencies: Tensor, amplitude: float) -> Tensor:
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (torch.stack((angles.cos(), angles.sin())) * amplitude).float()


def _scale(frequencies: Tensor, head_size: int, theta: float, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / torch.tensor(scaling.pair_factors, dtype=torch.float64)
    if scaling.kind == "yarn":
        kept = 1 - _ramp(head_size, theta, scaling)
    else:
        turns = scaling.original_length * frequencies / (2 * math.pi)
        width = scaling.high_frequency_factor - scaling.low_frequency_factor
        kept = ((turns - scaling.low_frequency_factor) / width).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _ramp(head_size: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Return how much each pair of channels is slowed down by yarn, from 0 for the fastest to 1 for the slowest."""

    def find_channel(num_turns: float) -> float:
        return head_size * math.log(scaling.original_length / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = find_channel(scaling.beta_fast), find_channel(scaling.beta_slow)
    if scaling.is_rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    pairs = torch.arange(head_size // 2, dtype=torch.float64)
    return ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
