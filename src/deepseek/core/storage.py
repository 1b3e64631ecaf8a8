"""Putting bytes on a disk so that they are there whole or not at all.

Artifacts, checkpoints and data caches are all written through `new_folder` and `write_file`: into a temporary
neighbour first, flushed to the device, and then renamed, so that a crash, a Ctrl-C or a full disk leaves what was
there before. Failures of the disk come out as one `StorageError` sentence.

Cost: one fsync for each file and folder; on the machines this was measured on a few milliseconds.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek.core.errors import StorageError

_CHUNK_BYTES = 1 << 20
_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EFBIG: "the file would be larger than this user may write; raise the limit or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "this user may not write there; choose another folder or change its owner",
    errno.EPERM: "this user may not write there; choose another folder or change its owner",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "there is no such place and it cannot be made; choose another folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another path",
    errno.EISDIR: "this path is a folder, not a file; choose another path",
}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` in one step when the block ends without an error.

    An older `path` stays readable until then and is replaced; on any error the temporary folder is removed and
    `path` is as it was. Raises `StorageError` for what the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explained_storage(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                _flush(file)
            _flush(temporary)
            _swap(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Raises `StorageError` for what the disk refuses."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explained_storage(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def explained_storage(path: Path) -> Iterator[None]:
    """Turn a disk's refusal inside the block into one `StorageError` sentence that names `path`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in _ADVICE:
            raise
        raise StorageError(error.errno, f"{path} cannot be written: {_ADVICE[error.errno]}") from error


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces so that memory stays flat."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _swap(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a folder cannot be renamed over a full one, so the old one steps aside."""
    if not path.exists():
        os.replace(temporary, path)
    else:
        aside = temporary.with_suffix(".old")
        os.replace(path, aside)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(aside, path)
            raise
        shutil.rmtree(aside)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
