"""Safetensors files by their headers: what is in them, without reading a tensor.

Used to plan a conversion, to check a checkpoint for migration, and to read single tensors afterwards. The format is
eight bytes of length, that much JSON, then the data without gaps. The library refuses a bad file with one error for
all causes and maps a good one into memory as a whole; here the cause is named, and a tensor is read by itself, so that
converting a large file stays small.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.compat.tensors import ITEM_BYTES, TensorSpec, torch_dtype
from deepseek.core.errors import ArtifactError, CorruptArtifactError

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
_LENGTH_BYTES = 8
# The library's own limit; a longer header is an attack or a broken length.
_MAX_HEADER_BYTES = 100_000_000
_MAX_CONFIG_BYTES = 5_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its position and its spec."""

    path: Path
    start: int
    spec: TensorSpec

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        import torch

        content = bytearray(self.spec.num_bytes)
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(content) != len(content):
                raise CorruptArtifactError(f"{self.path} became shorter while it was read; copy it again")
        if not content:
            return torch.empty(self.spec.shape, dtype=torch_dtype(self.spec.dtype))
        return torch.frombuffer(content, dtype=torch_dtype(self.spec.dtype)).view(self.spec.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file by name.

    Raises `CorruptArtifactError` for a truncated file, a header that is too long or malformed, and offsets that
    overlap, leave gaps or point outside.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is no regular file; name a safetensors file or the folder of a checkpoint")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
            raise CorruptArtifactError(
                f"{path} holds {size} bytes and announces a header of {length}; it is truncated or not safetensors"
            )
        header = _parse(path, file.read(length))
    data_start = _LENGTH_BYTES + length
    spans = {name: _read_entry(path, name, entry) for name, entry in header.items()}
    expected = 0
    for name, (spec, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != expected or end - begin != spec.num_bytes:
            raise CorruptArtifactError(
                f"{path}: the data of {name} is at {begin} to {end}, which does not fit its shape"
            )
        expected = end
    if data_start + expected != size:
        raise CorruptArtifactError(
            f"{path} holds {size} bytes, its header describes {data_start + expected}; copy it again"
        )
    return {name: StoredTensor(path, data_start + begin, spec) for name, (spec, begin, _) in spans.items()}


def read_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, or of a folder with one file or an index of several, in the order of the shards."""
    if not path.is_dir():
        return read_header(path)
    index = path / INDEX_NAME
    files = _indexed_files(index) if os.path.lexists(index) else sorted(path.glob("*.safetensors"))
    if not files:
        raise ArtifactError(f"{path} holds no safetensors file; name a checkpoint file or the folder of one")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        found = read_header(file)
        twice = sorted(stored.keys() & found.keys())
        if twice:
            raise CorruptArtifactError(
                f"{twice[0]} stands in {file.name} and in {stored[twice[0]].path.name}; remove one of them"
            )
        stored |= found
    return stored


def _indexed_files(index: Path) -> list[Path]:
    if not index.is_file() or index.stat().st_size > _MAX_HEADER_BYTES:
        raise CorruptArtifactError(f"{index} is no file of at most {_MAX_HEADER_BYTES} bytes; copy it again")
    listed = list(_mapping(index, _mapping(index, _parse(index, index.read_bytes())).get("weight_map")).values())
    names = sorted(set(filter(lambda name: isinstance(name, str), listed)))
    for name in (*(name for name in listed if not isinstance(name, str)), *names):
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptArtifactError(f"{index} names the file {name!r}; expected a file beside it")
        if not (index.parent / name).is_file():
            raise CorruptArtifactError(f"{index} names {name}, which is missing; copy the whole checkpoint again")
    return [index.parent / name for name in names]


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CorruptArtifactError(
            f"{path}: the header is not JSON ({error}); it is damaged or not safetensors"
        ) from error
    header = dict(_mapping(path, header))
    header.pop("__metadata__", None)
    return header


def _mapping(path: Path, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CorruptArtifactError(f"{path}: expected a JSON object, found {type(value).__name__}; the file is damaged")
    return value


def _read_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            is_shape = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
            if dtype in ITEM_BYTES and is_shape and 0 <= begin <= end and math.prod(shape) <= end:
                return TensorSpec(dtype, tuple(shape)), begin, end
    raise CorruptArtifactError(
        f"{path}: the entry of {name} is {str(entry)[:80]}; expected a known dtype, a shape and offsets"
    )


def read_model_type(path: Path) -> str | None:
    """Return the architecture's name in the Hugging Face config beside a file or in a folder, if there is one."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        if not config.is_file() or config.stat().st_size > _MAX_CONFIG_BYTES:
            return None
        settings = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        # The scan of a migration reports a broken config by itself; the weights are judged without it.
        return None
    return str(settings["model_type"]) if isinstance(settings, dict) and "model_type" in settings else None
