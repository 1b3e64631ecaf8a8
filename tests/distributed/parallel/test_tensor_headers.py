"""What a header announces has the shape and dtype of what follows it."""

from __future__ import annotations

import pytest
import torch

from deepseek.distributed.parallel.tensor_headers import allocate, empty_header, write_header


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_room_is_made_for_the_tensor_that_was_described(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    header = write_header(torch.zeros(shape, dtype=dtype))
    assert header.shape == empty_header(torch.device("cpu")).shape
    room = allocate(header, torch.device("cpu"))
    assert room.shape == shape and room.dtype == dtype
