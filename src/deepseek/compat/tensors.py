"""Tensors before their bytes are read: dtype and shape.

Conversions are planned on these alone, so that a plan for hundreds of gigabytes costs the headers of its files.
Dtypes carry the names of safetensors (`F32`, `BF16`), which need no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepseek.core.errors import ArtifactError
from deepseek.core.names import explain_unknown

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
ITEM_BYTES = {"F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8} | dict.fromkeys(
    ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1
)
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class TensorSpec:
    """A dtype in the names of safetensors, and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the size of the tensor in memory and in a file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating point numbers that a cast may touch."""
        return self.dtype in FLOAT_DTYPES


def describe(name: str, tensor: object) -> TensorSpec:
    """Return the spec of a torch tensor. Raises `ArtifactError` for anything else and for dtypes no file can hold."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ArtifactError(f"{name} is a {type(tensor).__name__}; expected a torch tensor: give a flat state dict")
    names = {torch_name: dtype for dtype, torch_name in _TORCH_NAMES.items()}
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in names:
        raise ArtifactError(
            f"{name} has dtype {dtype}, which cannot be converted; cast it to one of {', '.join(names)}"
        )
    return TensorSpec(names[dtype], tuple(tensor.shape))


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors name."""
    import torch

    found = getattr(torch, _TORCH_NAMES[dtype])
    assert isinstance(found, torch.dtype)
    return found


def parse_dtype(name: str) -> str:
    """Return the safetensors name of a floating dtype as users write it: `bf16`, `bfloat16`, `torch.bfloat16`, `BF16`.

    >>> parse_dtype("bfloat16"), parse_dtype("fp16")
    ('BF16', 'F16')
    """
    spellings = {spelling: dtype for dtype in FLOAT_DTYPES for spelling in (dtype.lower(), _TORCH_NAMES[dtype])}
    spellings |= {"fp16": "F16", "fp32": "F32", "fp64": "F64"}
    wanted = name.lower().removeprefix("torch.")
    if wanted not in spellings:
        raise ArtifactError(explain_unknown("dtype", name, spellings))
    return spellings[wanted]
