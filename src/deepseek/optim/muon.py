"""Muon whose orthogonalization is in FP32 on a CPU: torch's is in bf16 everywhere.

    momentum -> Newton-Schulz: the nearest matrix with orthogonal rows, about -> scaled to AdamW's size -> the weights

Many CPUs have no bf16 matmul (AVX2, and AVX-512 without its BF16 part), where one of 256 x 256 takes 26 ms against 1.3
in FP32, and a step of the quickstart's model ten times as long. FP32 also makes a run the same on CPUs with bf16 and
without. On other devices torch's own step runs. States are those of torch's `Muon`.

Under a plan a matrix is a DTensor that lies on several ranks in pieces, and what is orthogonalized has to be whole. The
matrices of a mesh are dealt to its ranks: of as many as there are ranks, each rank keeps the one that is its own when
they are gathered, all compute at the same time, and each sends its update to the others, which take their pieces. So
a rank computes 1/R of the updates; a matrix is sent twice. Matrices that are not cut are updated on every rank alike.

Sources: Jordan et al. 2024, "Muon"; Liu et al. 2025, arXiv:2502.16982, section 2.2, for the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


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
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if all(parameter.device.type != "cpu" and not isinstance(parameter, DTensor) for parameter in parameters):
            return super().step(closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update_group(group)
        return loss

    def _update_group(self, group: dict[str, Any]) -> None:
        by_mesh: dict[DeviceMesh, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if isinstance(parameter, DTensor):
                by_mesh.setdefault(parameter.device_mesh, []).append(cast("nn.Parameter", parameter))
            else:
                ahead = self._look_ahead(parameter, parameter.grad, group)
                _apply(parameter, parameter.shape, _orthogonalize_for(group, ahead), group)
        for mesh, parameters in by_mesh.items():
            for first in range(0, len(parameters), mesh.size()):
                self._update_round(mesh, parameters[first : first + mesh.size()], group)

    def _update_round(self, mesh: DeviceMesh, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """Update at most as many matrices as the mesh has ranks, each orthogonalized by another one."""
        own: Tensor | None = None
        mine = mesh.mesh.flatten().tolist().index(dist.get_rank())
        for index, parameter in enumerate(parameters):
            assert parameter.grad is not None
            whole = gather(cast("DTensor", self._look_ahead(parameter, parameter.grad, group)))
            if index == mine:
                own = _orthogonalize_for(group, whole).contiguous()  # tall ones are transposed
        for index, parameter in enumerate(parameters):
            update = own if index == mine and own is not None else torch.empty(parameter.shape, **_kind_of(parameter))
            send_to_all(update, index, mesh)
            piece = take_piece(update, cast("DTensor", parameter))
            _apply(cast("DTensor", parameter).to_local(), parameter.shape, piece, group)

    def _look_ahead(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Take a gradient into its running average, and return what is orthogonalized."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average: Tensor = state["momentum_buffer"]
        if not isinstance(average, DTensor):
            average.lerp_(gradient, 1 - group["momentum"])
            return gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        local, here = average.to_local(), cast("DTensor", gradient).to_local()
        local.lerp_(here, 1 - group["momentum"])
        ahead = here.lerp(local, group["momentum"]) if group["nesterov"] else local
        return DTensor.from_local(
            ahead,
            average.device_mesh,
            average.placements,
            run_check=False,
            shape=average.shape,
            stride=average.stride(),
        )


def _orthogonalize_for(group: dict[str, Any], matrix: Tensor) -> Tensor:
    return orthogonalize(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])


def _apply(weight: Tensor, shape: torch.Size, update: Tensor, group: dict[str, Any]) -> None:
    """Decay a matrix of `shape`, or a piece of it, and add the update, in place."""
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def _kind_of(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "device": tensor.device}


def gather(matrix: DTensor) -> Tensor:
    """Return the whole of a matrix, one axis of its mesh after the other: outer ones cut what inner ones left."""
    for axis in range(matrix.device_mesh.ndim):
        kept = matrix.placements[axis + 1 :]
        matrix = matrix.redistribute(placements=[Replicate()] * (axis + 1) + list(kept))
    return matrix.to_local()


def send_to_all(tensor: Tensor, sender: int, mesh: DeviceMesh) -> None:
    """Give all ranks of `mesh` the tensor of one of them, which is counted row by row, in place."""
    places = [int(place) for place in torch.unravel_index(torch.tensor(sender), mesh.shape)]
    for axis in reversed(range(mesh.ndim)):
        # Along the last axis the sender's own row has it; then each axis before hands on what those have.
        if all(mesh.get_local_rank(outer) == places[outer] for outer in range(axis)):
            dist.broadcast(tensor, group=mesh.get_group(axis), group_src=places[axis])


def take_piece(whole: Tensor, like: DTensor) -> Tensor:
    """Return the part of a whole tensor that this rank has of `like`; inner axes cut first."""
    piece = whole
    for axis in reversed(range(like.device_mesh.ndim)):
        placement: Any = like.placements[axis]
        if not isinstance(placement, Replicate):
            pieces = piece.chunk(like.device_mesh.size(axis), placement.dim)
            place = like.device_mesh.get_local_rank(axis)
            piece = pieces[place] if place < len(pieces) else pieces[0].narrow(placement.dim, 0, 0)
    return piece


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
