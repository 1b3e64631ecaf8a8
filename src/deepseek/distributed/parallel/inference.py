"""The answer of a model that lies in pieces: one forward pass over its tensor parallel ranks and its stages.

Every rank is called with the same inputs and gets the whole answer. Stages pass activations on one after the other;
there is no gradient, no micro-batch and no schedule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.parallel_model import ParallelModel

_MOST_DIMS = 8
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


@torch.no_grad()
def answer(parallel: ParallelModel, *inputs: Any, **named: Any) -> Tensor:
    """Return what the whole model answers to `inputs`, on every rank.

    Raises `ConfigError` for interleaved stages, which a single forward pass has no use for.
    """
    plan = parallel.plan
    if plan.virtual_stages > 1:
        raise ConfigError(f"virtual_stages={plan.virtual_stages} interleaves training passes; answer with 1")
    chunk = parallel.chunks[0]
    group, device = parallel.mesh.group("pp"), torch.device(parallel.mesh.base.device_type)
    stage, last = chunk.stage.index, plan.pp - 1
    if chunk.received is not None:
        chunk.received.value = _receive(group, stage - 1, device)
    output = _gather(chunk.module(*inputs, **named))
    if plan.pp == 1:
        return output
    if stage < last:
        _send(output, group, stage + 1)
    return _spread(output if stage == last else None, group, last, device)


def _gather(output: Any) -> Tensor:
    """Return a whole tensor where ranks hold parts of it."""
    whole: Tensor = output.full_tensor() if isinstance(output, DTensor) else output
    return whole.contiguous()


def _describe(tensor: Tensor) -> Tensor:
    header = torch.zeros(2 + _MOST_DIMS, dtype=torch.int64)
    values = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
    header[: len(values)] = torch.tensor(values)
    return header.to(tensor.device)


def _allocate(header: Tensor, device: torch.device) -> Tensor:
    dtype, num_dims, *sizes = header.tolist()
    return torch.empty(sizes[:num_dims], dtype=_DTYPES[dtype], device=device)


def _send(tensor: Tensor, group: dist.ProcessGroup, target: int) -> None:
    for message in (_describe(tensor), tensor):
        dist.send(message, group=group, group_dst=target)


def _receive(group: dist.ProcessGroup, source: int, device: torch.device) -> Tensor:
    header = torch.zeros(2 + _MOST_DIMS, dtype=torch.int64, device=device)
    dist.recv(header, group=group, group_src=source)
    tensor = _allocate(header, device)
    dist.recv(tensor, group=group, group_src=source)
    return tensor


def _spread(tensor: Tensor | None, group: dist.ProcessGroup, source: int, device: torch.device) -> Tensor:
    """Return on every rank of `group` the tensor that rank `source` of it has."""
    header = torch.zeros(2 + _MOST_DIMS, dtype=torch.int64, device=device) if tensor is None else _describe(tensor)
    dist.broadcast(header, group=group, group_src=source)
    whole = _allocate(header, device) if tensor is None else tensor
    dist.broadcast(whole, group=group, group_src=source)
    return whole
