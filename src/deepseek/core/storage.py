"""Putting bytes on a disk so that they are there whole or not at all.

Artifacts, checkpoints and data caches are all written through `new_folder` and `write_file`: into a temporary
neighbour first, flushed to the device, and then renamed, so that a crash, a Ctrl-C or a full disk leaves what was
there before. Failures of the disk come out as one `StorageError` sentence. A process that is killed leaves its
temporary neighbour, whose name starts with a dot and ends in `.tmp`; it may be deleted.

Cost: one fsync for each file and folder; on the machines this was measured on a few milliseconds.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek.core.errors import StorageError

CACHE_VARIABLE = "DEEPSEEK_CACHE_DIR"
# Linux, <fcntl.h> and <linux/fs.h>: paths as they are, and swap the two names.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
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
    errno.EEXIST: "a file is in the way; move it or choose another path",
    errno.ENAMETOOLONG: "its name is too long for this file system; choose a shorter one",
}


def find_cache_folder() -> Path:
    """Where results are kept that can be made again: `DEEPSEEK_CACHE_DIR`, or `~/.cache/deepseek` without it."""
    root = os.environ.get(CACHE_VARIABLE)
    return Path(root) if root else Path.home() / ".cache" / "deepseek"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` in one step when the block ends without an error.

    An older folder stays readable until then and is replaced; on any error the temporary folder is removed and `path`
    is as it was. A link is followed, and what it leads to is replaced. Raises `StorageError` for what the disk refuses.
    """
    target = path.resolve()
    temporary = _neighbour(target)
    with explained_storage(path):
        if target.exists() and not target.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if not file.is_symlink():
                    _flush(file)
            _flush(temporary)
            _put_in_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Raises `StorageError` for what the disk refuses."""
    temporary = _neighbour(path)
    with explained_storage(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def explained_storage(path: Path) -> Iterator[None]:
    """Turn a disk's refusal of `path` inside the block into one `StorageError` sentence that names it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in _ADVICE or not _is_about(error, path):
            raise
        raise StorageError(error.errno, f"{path} cannot be written: {_ADVICE[error.errno]}") from error


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces so that memory stays flat."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _neighbour(path: Path) -> Path:
    """A new name beside `path`, on the same file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _is_about(error: OSError, path: Path) -> bool:
    """Whether `error` comes from `path`, a neighbour or a folder above; a write that fails names no file at all."""
    if not isinstance(error.filename, str | bytes):
        return True
    refused, place = Path(os.path.realpath(os.fsdecode(error.filename))), Path(os.path.realpath(path))
    return refused.is_relative_to(place.parent) or place.is_relative_to(refused)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path`; what had that name before is then at `temporary`, or gone."""
    if not path.exists():
        temporary.replace(path)
    elif not _exchange(temporary, path):
        aside = temporary.with_suffix(".old")
        path.replace(aside)
        try:
            temporary.replace(path)
        except BaseException:
            aside.replace(path)
            raise
        shutil.rmtree(aside)
    _flush(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, or return False where the system cannot: a rename does not replace a full folder.

    Without it the old folder steps aside first, and a kill in that instant leaves it under its `.old` name only.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
