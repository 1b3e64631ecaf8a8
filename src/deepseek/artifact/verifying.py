"""Verify that the files of a folder are the ones that were written, and that none of them is a pickle.

Called when an artifact is opened and when a checkpoint is resumed. Sizes are compared first, since a truncated file is
the commonest damage and costs nothing to see; then every byte is hashed, about one second a gigabyte.

A pickle is a program: reading it runs any code its author chose. So none is ever opened here, and a model
in a pickle is refused by its name or by its first bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from deepseek.artifact.format import INDEX_NAME, MANIFEST_NAME, FileRecord
from deepseek.core.errors import ArtifactError, CorruptArtifactError, UnsafeFileError
from deepseek.core.storage import sha256_of

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")

_PICKLE_START = re.compile(rb"\x80[\x01-\x05]|PK\x03\x04", re.DOTALL)  # binary pickles; torch.save's zip archive
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_ADVICE = "convert it with `safetensors` in an environment you trust, and give the folder with the .safetensors file"


def measure_files(folder: Path, names: Collection[str] | None = None) -> dict[str, FileRecord]:
    """Record size and checksum of every file in `folder` and one folder below, or of those called `names`, by name."""
    found = [*folder.iterdir(), *folder.glob("*/*")] if names is None else [folder / name for name in names]
    files = {path.relative_to(folder).as_posix(): path for path in sorted(found) if path.is_file()}
    return {name: FileRecord(sha256=sha256_of(path), num_bytes=path.stat().st_size) for name, path in files.items()}


def verify_files(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise `CorruptArtifactError`, naming the file, unless every file of `records` has its size and its bytes."""
    for name, record in records.items():
        _verify_size(folder / name, record)
    for name, record in records.items():
        if _sha256(folder / name) != record.sha256:
            raise CorruptArtifactError(
                f"{folder / name} is not the file that was written (its sha256 differs); copy or write it again"
            )


def has_sizes(folder: Path, records: Mapping[str, FileRecord]) -> bool:
    """Return whether every file of `records` is there with its size; no byte is read."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == record.num_bytes
        for name, record in records.items()
    )


def verify_no_strangers(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise unless every weight file in `folder` is in `records`: somebody may have put it there."""
    for path in sorted(folder.iterdir()):
        if path.name in records or path.name == MANIFEST_NAME:
            continue
        if path.suffix in PICKLE_SUFFIXES:
            raise UnsafeFileError(f"{path} is a pickle beside an artifact that does not list it; remove it")
        if path.suffix == SAFETENSORS_SUFFIX or path.name == INDEX_NAME:
            raise CorruptArtifactError(f"{path} is a weight file that the manifest does not list; remove it")


def refuse_pickles(path: Path) -> None:
    """Raise `UnsafeFileError` where `path` is a pickle, or a folder whose only weights are pickles."""
    if path.is_dir():
        pickles = sorted(child for child in path.iterdir() if child.suffix in PICKLE_SUFFIXES)
        if pickles and not any(path.glob("*" + SAFETENSORS_SUFFIX)):
            raise UnsafeFileError(f"{pickles[0]} is a pickle, which may run any code when it is read; {_ADVICE}")
    elif path.is_file() and (path.suffix in PICKLE_SUFFIXES or is_pickle(path)):
        raise UnsafeFileError(f"{path} is a pickle, which may run any code when it is read; {_ADVICE}")


def is_pickle(path: Path) -> bool:
    """Return whether the first bytes of a file are those of a pickle or of `torch.save`'s archive."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header, which may happen to look like a pickle's first bytes.
    is_safetensors = start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES
    return not is_safetensors and _PICKLE_START.match(start) is not None


def _verify_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise CorruptArtifactError(f"{path} is missing, though the manifest lists it; copy or write the folder again")
    num_bytes = path.stat().st_size
    if num_bytes != record.num_bytes:
        damage = "truncated" if num_bytes < record.num_bytes else "longer than it was"
        raise CorruptArtifactError(
            f"{path} is {damage} ({num_bytes} bytes, written were {record.num_bytes}); copy or write it again"
        )


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); check its permissions and its disk") from error
