"""Gradients and weights of a model that lies in pieces: their joint norm, and whole tensors again.

A piece says itself over which axes it is cut: a DTensor by its placements, experts by their axis, all of a stage by the
pipeline. The square of a norm is summed over exactly those axes, so that what several ranks hold alike counts once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from deepseek.distributed.parallel.data_parallel import as_local
from deepseek.distributed.parallel.mesh import PlanMesh

EXPERT_AXIS = "ep"


def find_cut_axes(tensor: Tensor, *, is_expert: bool) -> tuple[str, ...]:
    """Return the axes over which ranks hold different pieces of `tensor`."""
    axes: tuple[str, ...] = (EXPERT_AXIS,) if is_expert else ()
    if isinstance(tensor, DTensor):
        names = tensor.device_mesh.mesh_dim_names or ()
        placements = zip(names, tensor.placements, strict=True)
        axes += tuple(name for name, placement in placements if not isinstance(placement, Replicate))
    return axes


def measure_norm(gradients: Iterable[tuple[Tensor, bool]], mesh: PlanMesh) -> float:
    """Return the norm of all `gradients` together, each with whether it is an expert's; the same on every rank."""
    squares: defaultdict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for gradient, is_expert in gradients:
        local = as_local(gradient)
        squares[find_cut_axes(gradient, is_expert=is_expert)].append(
            torch.linalg.vector_norm(local, dtype=torch.promote_types(local.dtype, torch.float32)).double() ** 2
        )
    total = torch.zeros((), dtype=torch.float64, device=mesh.base.device_type)
    for axes, values in sorted(squares.items()):
        part = torch.stack(values).sum()
        for axis in axes:
            dist.all_reduce(part, group=mesh.group(axis))
        total += part
    if mesh.plan.pp > 1:
        dist.all_reduce(total, group=mesh.group("pp"))
    return float(total.sqrt())


def scale_(gradients: Iterable[Tensor], factor: float) -> None:
    """Multiply pieces by `factor`, in place."""
    if factor != 1.0:
        for gradient in gradients:
            as_local(gradient).mul_(factor)


def sum_over(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace pieces that are parts of a sum by the sum over `group`, in one message for each dtype."""
    by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_dtype[gradient.dtype].append(as_local(gradient))
    for pieces in by_dtype.values():
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        dist.all_reduce(flat, group=group)
        for piece, summed in zip(pieces, flat.split([piece.numel() for piece in pieces]), strict=True):
            piece.copy_(summed.view_as(piece))


def gather_whole(tensor: Tensor, mesh: PlanMesh, *, is_expert: bool) -> Tensor:
    """Return the whole of a tensor that is cut, the same on all ranks that hold a piece."""
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        for index in range(len(whole.placements) - 1):  # one axis after the other: outer ones cut what inner ones left
            placements = [Replicate()] * (index + 1) + list(whole.placements[index + 1 :])
            whole = whole.redistribute(placements=placements)
        whole = whole.full_tensor()
    if is_expert and mesh.plan.ep > 1:
        parts = [torch.empty_like(whole) for _ in range(mesh.plan.ep)]
        dist.all_gather(parts, whole.contiguous(), group=mesh.group(EXPERT_AXIS))
        whole = torch.cat(parts)
    return whole


def cut_whole(whole: Tensor, like: Tensor, mesh: PlanMesh, *, is_expert: bool) -> Tensor:
    """Return this rank's piece of a whole tensor, cut as `like` is, on its device; what `gather_whole` undoes.

    No rank hears of another: each one needs the whole.
    """
    piece = whole.detach()
    if is_expert and mesh.plan.ep > 1:
        piece = piece.chunk(mesh.plan.ep)[mesh.coordinate(EXPERT_AXIS)]
    if not isinstance(like, DTensor):
        return piece.to(like.device)
    for axis in reversed(range(like.device_mesh.ndim)):  # inner axes first: outer ones cut what those left
        placement: Any = like.placements[axis]
        if not isinstance(placement, Replicate):
            pieces = piece.chunk(like.device_mesh.size(axis), placement.dim)
            place = like.device_mesh.get_local_rank(axis)
            piece = pieces[place] if place < len(pieces) else pieces[0].narrow(placement.dim, 0, 0)
    local = piece.to(like.to_local().device).contiguous()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
