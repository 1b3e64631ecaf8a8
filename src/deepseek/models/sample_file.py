"""Inputs as they will come, read from a file of the user's, for measuring backends and calibrating int8."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepseek.core.errors import ConfigError

NUM_ROWS = 64
"""Rows that int8 is calibrated on, as far as there are so many."""
_LABELS = "labels"  # of the same rows, which `deepseek benchmark` reads from the same file

Batch = tuple[Tensor, ...]


def read_samples(path: Path, drawn: Sequence[Tensor]) -> list[Batch]:
    """Read batches from an `.npz` file, as large and of the types of `drawn`, which the model is known to take.

    Raises `ConfigError` for a file that is none, for another number of arrays than inputs or other numbers of dims, and
    for fewer rows than one batch.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files if name != _LABELS}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no .npz file of arrays ({error}); write one with numpy.savez") from error
    if len(arrays) != len(drawn):
        raise ConfigError(
            f"{path} has {len(arrays)} arrays ({', '.join(arrays)}) and the model takes {len(drawn)} inputs; "
            "give one array for each, in their order"
        )
    size = len(drawn[0])
    for (name, array), tensor in zip(arrays.items(), drawn, strict=True):
        if array.ndim != tensor.dim() or len(array) < size:
            raise ConfigError(
                f"{path} has {name} of shape {list(array.shape)} and a batch is {list(tensor.shape)}; "
                f"give rows [N, ...] of that rank, at least {size} of them"
            )
    num_rows = min(len(array) for array in arrays.values())
    num_batches = max(1, min(num_rows, NUM_ROWS) // size)
    return [
        tuple(
            torch.from_numpy(array[start : start + size]).to(tensor.dtype)
            for array, tensor in zip(arrays.values(), drawn, strict=True)
        )
        for start in range(0, num_batches * size, size)
    ]
