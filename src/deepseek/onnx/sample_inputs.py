"""What an ONNX file wants to be called with, and inputs to try it with where a user gave none.

`describe_inputs` reads the description in the file, `build_inputs` makes tensors of it: the same every time, and such
that they are valid for any vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.onnx.files import UnsupportedOperatorError, torch_dtype

_FREE_LENGTHS = {0: 1, 2: 64, 3: 64}  # of a dimension that the file leaves open, by its index: batch; height, width
_FREE_LENGTH = 16
_MASK_NAMES = ("mask",)


@dataclass(frozen=True)
class InputSpec:
    """One input of a model in a file."""

    name: str
    shape: tuple[int | None, ...]
    """Its lengths; none where the file leaves one open."""
    dtype: torch.dtype
    names: tuple[str, ...] = ()
    """What the file calls its lengths; empty for one that has no name. Equal names are equal lengths."""

    def symbol(self, dim: int) -> str:
        """Return the name of an open length, or where it stands."""
        return (self.names[dim] if self.names else "") or f"dimension {dim} of {self.name}"


def list_open(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]] | None = None) -> list[str]:
    """List the lengths that the file leaves open and that `shapes` do not set."""
    opened = [(spec, dim) for spec in specs for dim, length in enumerate(spec.shape) if length is None]
    given = {spec.symbol(dim) for spec, dim in opened if spec.name in (shapes or {})}
    return [name for name in dict.fromkeys(spec.symbol(dim) for spec, dim in opened) if name not in given]


def describe_inputs(model: Any) -> list[InputSpec]:
    """Return what the model is called with, in order."""
    given = {weight.name for weight in model.graph.initializer}
    return [_describe(value) for value in model.graph.input if value.name not in given]


def build_inputs(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int = _FREE_LENGTH,
    lengths: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Tensor, ...]:
    """Build inputs to try a model with: reals are normal, masks all ones, other integers 0 or 1; the same every time.

    0 and 1 are rows of every table; where larger numbers matter, a user gives samples.

    `shapes` sets those of named inputs, `lengths` open lengths by their names. Others are `batch_size` in the first
    dimension, `sequence_length` where there are two or three, 64 for height and width; equal names are equal lengths.
    """
    shapes = shapes or {}
    names = [spec.name for spec in specs]
    for name in shapes:
        if name not in names:
            raise ConfigError(explain_unknown("input", name, names))
    fixed = [spec for spec in specs if spec.shape and spec.shape[0] not in (None, batch_size)]
    if batch_size > 1 and len(fixed) == len(specs) and not shapes:
        raise ConfigError(
            f"input {fixed[0].name!r} has {fixed[0].shape[0]} rows, always, and batch_size={batch_size} was asked for; "
            "export the model with an open batch, or leave batch_size out"
        )
    generator = torch.Generator().manual_seed(0)
    known = dict(lengths)
    for spec in sorted(specs, key=lambda spec: spec.name not in shapes):
        shape = _shape_of(spec, shapes.get(spec.name), batch_size, sequence_length)
        for dim, length in enumerate(shape):
            known.setdefault(spec.symbol(dim), length)
    return tuple(_build(spec, _shape_with(spec, shapes.get(spec.name), known), generator) for spec in specs)


def _describe(value: Any) -> InputSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise UnsupportedOperatorError(
            f"input {value.name!r} is no tensor but a sequence or map; export the model without it"
        )
    lengths = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
    names = tuple("" if dim.dim_value > 0 else str(dim.dim_param) for dim in tensor.shape.dim)
    return InputSpec(value.name, lengths, torch_dtype(tensor.elem_type), names)


def _shape_of(spec: InputSpec, wanted: Sequence[int] | None, batch_size: int, sequence_length: int) -> tuple[int, ...]:
    if wanted is None:
        free = {0: batch_size} | (_FREE_LENGTHS if len(spec.shape) > 3 else {1: sequence_length, 2: sequence_length})
        free[0] = batch_size
        return tuple(
            length if length is not None else free.get(dim, _FREE_LENGTH) for dim, length in enumerate(spec.shape)
        )
    fits = len(wanted) == len(spec.shape) and all(
        length in (None, given) for length, given in zip(spec.shape, wanted, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if length is None else str(length) for length in spec.shape)
        raise ConfigError(
            f"input {spec.name!r} has shape ({expected}) and {tuple(wanted)} was given; give one that fits"
        )
    return tuple(wanted)


def _shape_with(spec: InputSpec, wanted: Sequence[int] | None, known: Mapping[str, int]) -> tuple[int, ...]:
    if wanted is not None:
        return tuple(wanted)
    return tuple(known[spec.symbol(dim)] if length is None else length for dim, length in enumerate(spec.shape))


def _build(spec: InputSpec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype is torch.bool or any(word in spec.name.lower() for word in _MASK_NAMES):
        return torch.ones(shape, dtype=spec.dtype)
    if "token_type" in spec.name.lower():
        return torch.zeros(shape, dtype=spec.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(spec.dtype)
