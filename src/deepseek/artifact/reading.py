"""Opening an artifact: the manifest first, then every file against it, then tensors that stay on the disk.

`read_manifest` says what a folder holds and needs no torch. `open_artifact` verifies and
gives an `Artifact`, whose tensors are views of memory-mapped files: they cost address space until something reads
them, and the pages are private, so that training on them changes memory and never the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.artifact.format import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Manifest,
)
from deepseek.artifact.verifying import (
    SAFETENSORS_SUFFIX,
    is_pickle,
    refuse_pickles,
    verify_files,
    verify_no_strangers,
)
from deepseek.core.errors import ArtifactError, CorruptArtifactError, UnsafeFileError
from deepseek.core.names import explain_unknown

if TYPE_CHECKING:
    from torch import Tensor


_MAX_MANIFEST_BYTES = 64 << 20  # a line for each file and each setting
RUN_MODEL_NAME = "model"  # where a training run leaves its model


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its manifest, and its files on demand."""

    folder: Path
    manifest: Manifest

    def tensors(self) -> dict[str, Tensor]:
        """Map all tensors into memory, by name. Raises `CorruptArtifactError` where a file cannot be parsed."""
        weights = [name for name in self.manifest.files if name.endswith(SAFETENSORS_SUFFIX)]
        return read_tensors(self.folder / name for name in weights)

    def has_file(self, name: str) -> bool:
        """Return whether the manifest lists `name`."""
        return name in self.manifest.files

    def read_bytes(self, name: str) -> bytes:
        """Read one file, `tokenizer.json` for example. Raises `ArtifactError` for a file that is not listed."""
        if not self.has_file(name):
            raise ArtifactError(f"{self.folder}: {explain_unknown('file', name, self.manifest.files)}")
        return (self.folder / name).read_bytes()


def open_artifact(folder: str | Path, *, verify: bool = True) -> Artifact:
    """Open the artifact in `folder`; with `verify`, every file is hashed and compared with the manifest first.

    Raises `CorruptArtifactError` with the name of the file that is damaged or missing, `UnsafeFileError` for a pickle,
    `UnsupportedSchemaError` for an artifact of a newer deepseek, and `ArtifactError` where there is none.
    """
    artifact = Artifact(Path(folder), read_manifest(folder))
    verify_no_strangers(artifact.folder, artifact.manifest.files)
    if verify:
        verify_files(artifact.folder, artifact.manifest.files)
    return artifact


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of the artifact in `folder`, checked against its own checksum; no other file is read."""
    folder = Path(folder)
    refuse_pickles(folder)
    if not folder.is_dir():
        seen = "is a file" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {seen}; give the folder of an artifact")
    if not is_artifact(folder):
        raise ArtifactError(f"{folder} has no {MANIFEST_NAME}, so it is not an artifact; check the path")
    path = folder / MANIFEST_NAME
    if (size := path.stat().st_size) > _MAX_MANIFEST_BYTES:
        raise CorruptArtifactError(
            f"{path} has {size} bytes, and a manifest has at most {_MAX_MANIFEST_BYTES}; write the artifact again"
        )
    return Manifest.from_json(path.read_bytes(), source=str(path))


def is_artifact(folder: str | Path) -> bool:
    """Return whether `folder` holds a manifest; a Hugging Face folder holds none."""
    return (Path(folder) / MANIFEST_NAME).is_file()


def is_adapter(folder: str | Path) -> bool:
    """Return whether `folder` holds an adapter and no model."""
    folder = Path(folder)
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not any(
        (folder / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME)
    )


def find_model_folder(folder: str | Path) -> Path:
    """Return the model's folder: `folder` itself, or the `model` in it where it is the folder of a training run."""
    folder = Path(folder)
    return folder / RUN_MODEL_NAME if not is_artifact(folder) and is_artifact(folder / RUN_MODEL_NAME) else folder


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Map the tensors of several safetensors files into memory; a name may stand in one file only."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        found = read_tensor_file(path)
        twice = tensors.keys() & found.keys()
        if twice:
            raise CorruptArtifactError(f"tensor {min(twice)!r} of {path} stands in another file too; write them again")
        tensors |= found
    return tensors


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """Map the tensors of one safetensors file into memory."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CorruptArtifactError(f"{path} is no regular file; expected a safetensors file, copy it again")
    if is_pickle(path):
        raise UnsafeFileError(f"{path} is a pickle with the name of a safetensors file; do not load it")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise CorruptArtifactError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
