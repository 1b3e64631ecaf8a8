"""Reading an ONNX file that somebody else wrote: what it holds is checked before anything is done with it.

`read_onnx` gives the whole model with its weights. Before the weights are read, the places that the file names for
them are checked: a weight that lies outside the model's folder (an absolute path, `..`, a link that leads away) would
let a downloaded model read any file of this machine, so it is refused. `describe_inputs` says what a model wants to be
called with. Format: https://onnx.ai/onnx/repo-docs/IR.html, section "External Tensor Data".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from deepseek.artifact.verifying import is_pickle
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, UnsafeFileError
from deepseek.core.extras import require
from deepseek.core.names import explain_unknown

ONNX_SUFFIX = ".onnx"
MIN_OPSET, MAX_OPSET = 11, 23
_FREE_LENGTHS = {0: 1, 2: 64, 3: 64}  # of a dimension that the file leaves open, by its place: batch; height, width
_FREE_LENGTH = 16
_MASK_NAMES = ("mask",)


class UnsupportedOperatorError(ConfigError):
    """An ONNX graph holds something that has no twin here: an operator, a use of one, a type; it may run elsewhere."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model in a file."""

    name: str
    shape: tuple[int | None, ...]
    """Its lengths; none where the file leaves one open."""
    dtype: torch.dtype


def read_onnx(path: Path) -> Any:
    """The `ModelProto` in the file `path`, with its weights.

    Raises `UnsafeFileError` for a pickle or weights outside the folder, and `CorruptArtifactError` for a file that is
    damaged or whose weights are missing.
    """
    onnx = require("onnx", extra="compile")
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; give the path of an ONNX file")
    if is_pickle(path):
        raise UnsafeFileError(f"{path} is a pickle with the name of an ONNX file; do not load it")
    model = _parse(onnx, path)
    refuse_outside_weights(model, path)
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise CorruptArtifactError(
            f"the weights of {path} cannot be read ({_first_line(error)}); copy it again"
        ) from error
    return model


def opset_of(model: Any, path: Path | str) -> int:
    """The version of ONNX's own operators that `model` uses; raises for one that is not converted here."""
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    if not versions:
        raise UnsupportedOperatorError(f"{path} imports no opset of ONNX itself; export it again")
    version = int(max(versions))
    if not MIN_OPSET <= version <= MAX_OPSET:
        raise UnsupportedOperatorError(
            f"{path} uses opset {version} and {MIN_OPSET} to {MAX_OPSET} are converted here; "
            "export it again, or run it as it is with backend='onnxruntime'"
        )
    return version


def refuse_outside_weights(model: Any, path: Path) -> None:
    """Raise `UnsafeFileError` where a weight of `model` lies outside the folder of `path`."""
    folder = path.parent.resolve()
    for tensor in _all_tensors(model.graph):
        location = {each.key: each.value for each in tensor.external_data}.get("location")
        if location is None:
            continue
        if "\\" in location or Path(location).is_absolute() or not (folder / location).resolve().is_relative_to(folder):
            raise UnsafeFileError(
                f"{path} keeps weight {tensor.name!r} at {location!r}, outside its own folder; do not load it"
            )


def describe_inputs(model: Any) -> list[InputSpec]:
    """What the model is called with, in order."""
    given = {each.name for each in model.graph.initializer}
    return [_describe(each) for each in model.graph.input if each.name not in given]


def draw_inputs(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int = _FREE_LENGTH,
) -> tuple[Tensor, ...]:
    """Inputs to try a model with: reals are normal, masks all ones, other integers below 100; the same every time.

    `shapes` sets those of named inputs. Open lengths are `batch_size` in the first place, `sequence_length` in two or
    three dimensions, 64 for height and width.
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
    return tuple(
        _draw(spec, _shape_of(spec, shapes.get(spec.name), batch_size, sequence_length), generator) for spec in specs
    )


def _parse(onnx: Any, path: Path) -> Any:
    damaged = require("google.protobuf.message", extra="compile").DecodeError
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (damaged, ValueError) as error:
        raise CorruptArtifactError(f"{path} is not a whole ONNX file ({_first_line(error)}); copy it again") from error
    if not model.graph.node or not model.graph.output:
        raise CorruptArtifactError(f"{path} holds no graph; copy or export it again")
    return model


def _all_tensors(graph: Any) -> Iterator[Any]:
    """Every stored tensor of a graph: its weights, and those inside attributes, however deep."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_tensors(inner)


def _describe(value: Any) -> InputSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise UnsupportedOperatorError(
            f"input {value.name!r} is no tensor but a sequence or map; export the model without it"
        )
    lengths = tuple(each.dim_value if each.dim_value > 0 else None for each in tensor.shape.dim)
    return InputSpec(value.name, lengths, torch_dtype(tensor.elem_type))


def torch_dtype(elem_type: int) -> torch.dtype:
    """The dtype of torch for a number of ONNX's `TensorProto.DataType`."""
    if elem_type not in _DTYPES:
        onnx = require("onnx", extra="compile")
        name = onnx.TensorProto.DataType.Name(elem_type)
        raise UnsupportedOperatorError(f"tensors of type {name} have no twin in torch; export the model without them")
    return _DTYPES[elem_type]


def to_torch(tensor: Any) -> Tensor:
    """A tensor of the file, copied."""
    onnx = require("onnx", extra="compile")
    dtype = torch_dtype(tensor.data_type)
    if dtype is torch.bfloat16:
        return torch.from_numpy(numpy.array(onnx.numpy_helper.to_array(tensor), dtype=numpy.float32)).bfloat16()
    return torch.from_numpy(numpy.array(onnx.numpy_helper.to_array(tensor)))


def _shape_of(spec: InputSpec, wanted: Sequence[int] | None, batch_size: int, sequence_length: int) -> tuple[int, ...]:
    if wanted is None:
        free = {0: batch_size} | (_FREE_LENGTHS if len(spec.shape) > 3 else {1: sequence_length, 2: sequence_length})
        free[0] = batch_size
        return tuple(
            length if length is not None else free.get(place, _FREE_LENGTH) for place, length in enumerate(spec.shape)
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


def _draw(spec: InputSpec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype is torch.bool or any(word in spec.name.lower() for word in _MASK_NAMES):
        return torch.ones(shape, dtype=spec.dtype)
    if "token_type" in spec.name.lower():
        return torch.zeros(shape, dtype=spec.dtype)
    return torch.randint(0, 100, shape, generator=generator).to(spec.dtype)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


# TensorProto.DataType, in numbers that never change.
_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    16: torch.bfloat16,
}
