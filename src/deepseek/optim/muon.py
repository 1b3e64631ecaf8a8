"""Muon whose orthogonalization is in FP32 on a CPU: torch's is in bf16 everywhere.

    momentum -> Newton-Schulz: the nearest matrix with orthogonal rows, about -> scaled to AdamW's size -> the weights

Many CPUs have no bf16 matmul (AVX2, and AVX-512 without its BF16 part), where one of 256 x 256 takes 26 ms against 1.3
in FP32, and a step of the quickstart's model ten times as long. FP32 also makes a run the same on CPUs with bf16 and
without. On other devices torch's own step runs. States are those of torch's `Muon`.

Sources: Jordan et al. 2024, "Muon"; Liu et al. 2025, arXiv:2502.16982, section 2.2, for the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with updates of the size of AdamW's, computed in at least FP32 on a CPU.

    >>> weight = nn.Parameter(torch.eye(16))
    >>> optimizer = Muon([weight], lr=0.1, weight_decay=0.0)
    >>> weight.grad = torch.diag(torch.arange(1.0, 17.0))
    >>> optimizer.step()
    >>> round(1 - weight[15, 15].item(), 1)  # about 0.1 x 0.2 x sqrt(16)
    0.1
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights; with a `closure`, compute loss and gradients by it first and return the loss."""
        if any(parameter.device.type != "cpu" for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        update = orthogonalize(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float) -> Tensor:
    """Return about the nearest (R, C) matrix with orthogonal rows or columns, whose singular values are near 1.

    Each step applies a X + b (X X^T) X + c (X X^T)^2 X, a polynomial that brings all singular values in (0, 1] there.

    >>> orthogonalize(torch.diag(torch.tensor([1.0, 4.0])), (1.875, -1.25, 0.375), 30, 1e-7).round(decimals=3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    a, b, c = coefficients
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    x = wide.t() if wide.shape[0] > wide.shape[1] else wide
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.t() if wide.shape[0] > wide.shape[1] else x).to(matrix.dtype)
