"""One run at a time in one folder.

    with locked_folder(Path("runs/tiny")):
        ...

A run writes checkpoints, caches and events into its folder, and two of them would write over each other. The lock is
the system's own on an open file (`flock`), so it ends with its process, however that ends: the file of one that was
killed is taken over. What stands in the file, process, host and time, is for the message. Several hosts that share a
folder see each other's lock where the file system carries `flock` (NFS since version 4, Lustre, CephFS).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from deepseek.core.errors import StorageError
from deepseek.core.storage import explained_storage

LOCK_FILE = "run.lock"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if need be, while the block runs; raises `StorageError` where another run does."""
    path = folder / LOCK_FILE
    with explained_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    try:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with explained_storage(folder):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is let go: afterwards the file may be somebody else's
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor of the file at `path` that holds its lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _describe_owner(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise StorageError(
                f"{path.parent} is being written by {owner}; wait until it is done, stop it, or choose another folder"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # whoever held it has removed the file in between: the lock is of no use


def _describe_owner(content: bytes) -> str:
    """Process, host and time as they stand in a lock file.

    >>> _describe_owner(b'{"pid": 7, "host": "node1", "since": "2026-11-30T12:00:00+00:00"}')
    'process 7 on node1 since 2026-11-30T12:00:00+00:00'
    """
    try:
        owner = json.loads(content)
    except ValueError:  # it has just begun
        return "another run"
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
