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
from deepseek.distributed.parallel.tensor_headers import allocate, empty_header, write_header


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


def _send(tensor: Tensor, group: dist.ProcessGroup, target: int) -> None:
    for message in (write_header(tensor), tensor):
        dist.send(message, group=group, group_dst=target)


def _receive(group: dist.ProcessGroup, source: int, device: torch.device) -> Tensor:
    header = empty_header(device)
    dist.recv(header, group=group, group_src=source)
    tensor = allocate(header, device)
    dist.recv(tensor, group=group, group_src=source)
    return tensor


def _spread(tensor: Tensor | None, group: dist.ProcessGroup, source: int, device: torch.device) -> Tensor:
    """Return on every rank of `group` the tensor that rank `source` of it has."""
    header = empty_header(device) if tensor is None else write_header(tensor)
    dist.broadcast(header, group=group, group_src=source)
    whole = allocate(header, device) if tensor is None else tensor
    dist.broadcast(whole, group=group, group_src=source)
    return whole
