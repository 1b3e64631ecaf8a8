"""Reading an ONNX file that somebody else wrote: what it holds is checked before anything is done with it.

`read_onnx` returns the whole model with its weights. Before the weights are read, the paths that the file names for
them are checked: a weight that lies outside the model's folder (an absolute path, `..`, a link that leads away) would
let a downloaded model read any file of this machine, so it is refused.
Format: https://onnx.ai/onnx/repo-docs/IR.html, section "External Tensor Data".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from deepseek.artifact.verifying import is_pickle
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, UnsafeFileError, first_line
from deepseek.core.extras import require

ONNX_SUFFIX = ".onnx"
MIN_OPSET, MAX_OPSET = 11, 28


class UnsupportedOperatorError(ConfigError):
    """An ONNX graph holds an operator, a use of one, or a type that has no counterpart here; it may run elsewhere."""

    position: int = -1
    """How many operators were translated before."""
    numbers: tuple[int, ...] = ()
    """Lengths that the operator may have asked for, where torch refused those of the sample inputs."""


def read_onnx(path: Path) -> Any:
    """Return the `ModelProto` in the file `path`, with its weights.

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
            f"the weights of {path} cannot be read ({first_line(error)}); copy it again"
        ) from error
    return model


def opset_of(model: Any, path: Path | str) -> int:
    """Return the version of ONNX's own operators that `model` uses; raise for one that is not converted here."""
    versions = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
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
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location")
        if location is None:
            continue
        if "\\" in location or Path(location).is_absolute() or not (folder / location).resolve().is_relative_to(folder):
            raise UnsafeFileError(
                f"{path} keeps weight {tensor.name!r} at {location!r}, outside its own folder; do not load it"
            )


def _parse(onnx: Any, path: Path) -> Any:
    damaged = require("google.protobuf.message", extra="compile").DecodeError
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (damaged, ValueError) as error:
        raise CorruptArtifactError(f"{path} is not a whole ONNX file ({first_line(error)}); copy it again") from error
    if not model.graph.node or not model.graph.output:
        raise CorruptArtifactError(f"{path} holds no graph; copy or export it again")
    return model


def _all_tensors(graph: Any) -> Iterator[Any]:
    """Yield every stored tensor of a graph: its weights, and those inside attributes, however deep."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_tensors(inner)


def torch_dtype(elem_type: int) -> torch.dtype:
    """Return the dtype of torch for a number of ONNX's `TensorProto.DataType`."""
    if elem_type not in _DTYPES:
        onnx = require("onnx", extra="compile")
        name = onnx.TensorProto.DataType.Name(elem_type)
        raise UnsupportedOperatorError(f"torch has no tensors of type {name}; export the model without them")
    return _DTYPES[elem_type]


def to_torch(tensor: Any) -> Tensor:
    """Copy a tensor of the file."""
    onnx = require("onnx", extra="compile")
    dtype = torch_dtype(tensor.data_type)
    if dtype is torch.bfloat16:
        return torch.from_numpy(numpy.array(onnx.numpy_helper.to_array(tensor), dtype=numpy.float32)).bfloat16()
    return torch.from_numpy(numpy.array(onnx.numpy_helper.to_array(tensor)))


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
_ONNX_NAMES = {torch.float32: "float", torch.float64: "double"}
ONNX_TYPES = {
    dtype: f"tensor({_ONNX_NAMES.get(dtype, str(dtype).removeprefix('torch.'))})" for dtype in _DTYPES.values()
}
"""What ONNX calls tensors of a dtype where it says what its operators take."""
