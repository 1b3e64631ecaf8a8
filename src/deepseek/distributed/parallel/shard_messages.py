"""The messages of ZeRO by `DeepSeekComm`'s algorithms: what FSDP2 takes in the place of torch's own.

Gloo sums a whole buffer on every rank where a part each would do, and sends around in the order of ranks, wherever they
are. A ring over the hosts sends half as many bytes of gradients, and leaves each host once. FSDP2 asks for a class with
`allocate` and `__call__` (`FSDPModule.set_custom_all_gather`, `set_custom_reduce_scatter`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.distributed.communicator import DeepSeekComm

ALGORITHM = "ring"


class _Messages:
    """A communicator for each group that shards are spread over."""

    def __init__(self, comm: DeepSeekComm) -> None:
        self._comm = comm
        self._groups: dict[dist.ProcessGroup, DeepSeekComm] = {}

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer for a message."""
        return torch.empty(*size, dtype=dtype, device=device)

    def find(self, group: dist.ProcessGroup) -> DeepSeekComm:
        """Return the communicator of a group."""
        if group not in self._groups:
            self._groups[group] = self._comm.over(group, "shards")
        return self._groups[group]


class GatherShards(_Messages):
    """Gathers the weights of a block from the ranks that hold a part each."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        output_tensor.copy_(self.find(group).all_gather(input_tensor, algorithm=ALGORITHM))


class ScatterGradients(_Messages):
    """Sums the gradients of a block, of which every rank keeps its part."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        output_tensor.copy_(self.find(group).reduce_scatter(input_tensor, op, algorithm=ALGORITHM))
