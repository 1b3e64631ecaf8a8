"""The header that goes ahead of a tensor whose shape the receiver does not know: dtype, dimensions, sizes.

header = write_header(tensor)                10 integers of 8 bytes, on the tensor's device
tensor = allocate(header, device)            an empty tensor as the header says
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_DIMS = 8
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


def write_header(tensor: Tensor) -> Tensor:
    """Return the (10,) header of a tensor of up to 8 dimensions.

    >>> write_header(torch.zeros(3, 4))[:4].tolist()
    [1, 2, 3, 4]
    """
    header = torch.zeros(2 + _MOST_DIMS, dtype=torch.int64)
    values = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
    header[: len(values)] = torch.tensor(values)
    return header.to(tensor.device)


def empty_header(device: torch.device) -> Tensor:
    """Return room for a header."""
    return torch.zeros(2 + _MOST_DIMS, dtype=torch.int64, device=device)


def allocate(header: Tensor, device: torch.device) -> Tensor:
    """Return room for the tensor that a header announces.

    >>> allocate(write_header(torch.zeros(3, 4)), torch.device("cpu")).shape
    torch.Size([3, 4])
    """
    dtype, num_dims, *sizes = header.tolist()
    return torch.empty(sizes[:num_dims], dtype=_DTYPES[dtype], device=device)
