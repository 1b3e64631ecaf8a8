"""Writing an artifact, whole or not at all.

Training, compression and conversion call `write_artifact` with the tensors and a `Description`; the file table, the
time and the version are added here. Everything goes into a temporary folder that is renamed at the end, so a full disk
or a kill leaves what was there before.

Tied weights are stored once: two names for one piece of memory are refused, because a copy of each would come back as
two tensors that drift apart. The architecture ties them again when it loads.
Cost: one copy of a tensor that is not contiguous or not on the CPU, one file at a time, and a second read for hashing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.artifact.format import (
    INDEX_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Description,
    Manifest,
    is_inner_name,
)
from deepseek.artifact.verifying import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, measure_files
from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.core.machine import describe_versions
from deepseek.core.storage import new_folder

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000  # what Hugging Face tools split at
_READ_WRITE = 0o666
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_artifact(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    description: Description,
    *,
    files: Mapping[str, bytes] | None = None,
    weights_name: str = WEIGHTS_NAME,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Manifest:
    """Write `tensors` and `files` (`config.json`, `tokenizer.json`, ...) as the artifact `folder`.

    Weights above `max_shard_bytes` are split over several files; otherwise their file is called `weights_name`. An
    existing artifact is replaced with `overwrite` only, and a folder that holds anything else never. Raises
    `ArtifactError` for tensors that share memory or cannot be stored, and `StorageError` for what the disk refuses.
    """
    folder = Path(folder)
    files = files or {}
    _refuse_existing(folder, overwrite=overwrite)
    _refuse_names(files)
    _refuse_shared(tensors)
    with new_folder(folder) as temporary:
        _write_weights(temporary, tensors, weights_name, max_shard_bytes)
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        manifest = Manifest(
            **description.to_dict(),
            files=measure_files(temporary),
            created_at=datetime.now(UTC),
            deepseek_version=describe_versions(())["deepseek"],
        )
        (temporary / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; a disk's refusal comes out as the `OSError` it is."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: _prepare(name, tensor) for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt"})  # transformers asks for this entry
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise ArtifactError(f"{path} cannot be written as safetensors ({error}); check the tensors") from error
        raise OSError(int(number[1]), str(error), str(path)) from error
    # The library makes files for their owner alone; a server often runs as somebody else.
    path.chmod(path.parent.stat().st_mode & _READ_WRITE)


def split(sizes_bytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Divide names over files of at most `max_shard_bytes`, in order; a tensor larger than that has a file of its own.

    >>> split({"a": 4, "b": 5, "c": 2, "d": 20, "e": 1}, 10)
    [['a', 'b'], ['c'], ['d'], ['e']]
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}; give at least 1")
    shards: list[list[str]] = [[]]
    room_bytes = max_shard_bytes
    for name, size_bytes in sizes_bytes.items():
        if size_bytes > room_bytes and shards[-1]:
            shards.append([])
            room_bytes = max_shard_bytes
        shards[-1].append(name)
        room_bytes -= size_bytes
    return shards


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], name: str, max_shard_bytes: int) -> None:
    sizes_bytes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    shards = split(sizes_bytes, max_shard_bytes)
    if len(shards) == 1:
        write_tensor_file(folder / name, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}{SAFETENSORS_SUFFIX}"
        write_tensor_file(folder / file_name, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": sum(sizes_bytes.values())}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _prepare(name: str, tensor: Tensor) -> Tensor:
    """Return a plain, dense, contiguous CPU tensor that owns the whole of its memory."""
    _refuse_unstorable(name, tensor)
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    owns_memory = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if owns_memory else tensor.clone()


def _refuse_unstorable(name: str, tensor: Tensor) -> None:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.layout is not torch.strided:
        kind = f"{tensor.layout} {type(tensor).__name__}"
        raise ArtifactError(f"tensor {name!r} is a {kind}; give a plain dense tensor")
    if tensor.is_meta:
        raise ArtifactError(f"tensor {name!r} is on the meta device and has no values; load or initialize it first")
    if tensor.dtype in (torch.complex128, torch.complex32):
        raise ArtifactError(
            f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold; store view_as_real of it"
        )


def _refuse_existing(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; give the path of a folder")
    if not any(folder.iterdir()):
        return
    if not (folder / MANIFEST_NAME).is_file():
        raise ArtifactError(f"{folder} holds files that are not an artifact, and is left alone; give another folder")
    if not overwrite:
        raise ArtifactError(f"{folder} holds an artifact already; give another folder, or ask for it to be overwritten")


def _refuse_names(files: Mapping[str, bytes]) -> None:
    for name in files:
        if not is_inner_name(name):
            raise ArtifactError(f"file name {name!r} leaves the artifact's folder; give a plain file name")
        if name in (MANIFEST_NAME, INDEX_NAME) or name.endswith((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)):
            raise ArtifactError(f"file name {name!r} is kept for weights and the manifest; choose another name")


def _refuse_shared(tensors: Mapping[str, Tensor]) -> None:
    owners: dict[tuple[str, int], str] = {}
    for name, tensor in tensors.items():
        _refuse_unstorable(name, tensor)
        if tensor.numel() == 0:
            continue
        owner = owners.setdefault((str(tensor.device), tensor.data_ptr()), name)
        if owner != name:
            raise ArtifactError(f"tensors {owner!r} and {name!r} share memory; store one of them and tie on loading")
