"""A root-mean-square norm whose weight counts from one, as Gemma has it.

`torch.nn.RMSNorm` is for all others. Gemma stores w and multiplies by 1 + w, in float32 and before the result is
rounded to the dtype of the input; to store 1 + w instead would round it to a coarser grid. Shapes: (..., D) in and out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CenteredRMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)`, computed in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y: Tensor = F.rms_norm(x.to(dtype), self.weight.shape, 1 + self.weight.to(dtype), self.eps)
        return y.to(x.dtype)
