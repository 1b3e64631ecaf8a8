"""Compiled code kept on disk, so that the next process starts where this one ended.

    store = CompiledStore(digest_of("encoder", parts))
    store.load()          # before compiling: hands torch what an earlier process compiled
    store.save()          # after compiling: writes what this process compiled

An entry is one file under `DEEPSEEK_CACHE_DIR` (else `~/.cache/deepseek`), `compiled/<digest>.bundle`: torch's portable
cache artifacts, and beside them the compiled CPU libraries, without which the next process would run the C++ compiler
again. The digest covers the structure of the model, torch, Python and the processor, so that no machine is handed code
for another one.

**What is trusted.** torch's artifacts hold pickles, which torch loads when it looks a graph up, and libraries are code.
So nothing is handed on that this user did not write: the folder and the files must belong to this user and be closed to
others (modes 0700 and 0600), and every bundle ends in an HMAC-SHA256 under a key that only this user can read, which is
checked before a byte is looked at. Of torch's artifacts only compiled graphs are kept. A bundle that is damaged, or
foreign, is ignored with a warning. Two processes may write at once: files appear whole, and the later one stays.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import platform
import re
import secrets
import stat
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path

from deepseek.core.errors import StorageError
from deepseek.core.machine import describe_machine, list_processor_flags
from deepseek.core.storage import explained_storage, find_cache_folder, write_file

_MAGIC = b"deepseek compiled 1\n"
_KEY_NAME = "key"
_KEY_BYTES = 32
_KINDS = frozenset({"inductor", "aot_autograd"})
# torch names its files by a hash in base 32; anything else in a bundle would be a path of someone's choice.
_LIBRARY_NAME = re.compile(r"[a-z2-7]{10,64}(\.main)?\.so")


class CompiledCacheWarning(UserWarning):
    """Compiled code could not be kept or reused; everything runs as without it, and compiles again."""


def find_compiled_folder() -> Path:
    """Return where compiled code is kept."""
    return find_cache_folder() / "compiled"


def digest_of(*parts: str) -> str:
    """SHA-256 of `parts` together with what else decides whether compiled code fits: torch, Python, the processor."""
    import torch

    machine = describe_machine()
    ours = (
        torch.__version__,
        platform.python_version(),
        str(torch.version.cuda),
        torch.backends.cpu.get_cpu_capability(),
    )
    where = (machine["processor"], machine["architecture"], machine["system"], _processor_flags())
    return hashlib.sha256(json.dumps([*parts, *ours, *where]).encode()).hexdigest()


class CompiledStore:
    """The entry of one digest: `load` once before compiling, `save` whenever something was compiled."""

    def __init__(self, digest: str, folder: Path | None = None) -> None:
        self.folder = folder or find_compiled_folder()
        self.path = self.folder / f"{digest}.bundle"
        self._saved = b""

    def load(self) -> int:
        """Hand torch the compiled graphs of an earlier process; the number of graphs, 0 where there are none.

        What cannot be used is ignored with a `CompiledCacheWarning`.
        """
        try:
            content = _read_private(self.path)
            artifacts, libraries = _unpack(content, _read_key(self.folder))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            _warn(f"compiled code in {self.path} is ignored ({error}); delete it to be rid of this warning")
            return 0
        _place_libraries(libraries)
        return _hand_to_torch(artifacts)

    def save(self) -> bool:
        """Write all graphs that this process compiled, and their libraries; whether a file was written.

        A folder that cannot be written is a `CompiledCacheWarning`, once per store.
        """
        artifacts = _collect_artifacts()
        if not artifacts or artifacts == self._saved:
            return False
        self._saved = artifacts
        try:
            _make_private(self.folder)
            key = _read_key(self.folder)
            write_file(self.path, _pack(artifacts, _collect_libraries(), key))
            self.path.chmod(0o600)
        except (StorageError, PermissionError, ValueError) as error:
            _warn(f"compiled code is not kept ({error}); the next process compiles again")
            return False
        return True


def _pack(artifacts: bytes, libraries: dict[str, bytes], key: bytes) -> bytes:
    """Header with the lengths, the parts, and the seal over all of it."""
    index = json.dumps(
        {"artifacts": len(artifacts), "libraries": {name: len(library) for name, library in libraries.items()}}
    )
    head = index.encode()
    body = b"".join([_MAGIC, struct.pack("<Q", len(head)), head, artifacts, *libraries.values()])
    return body + _seal(body, key)


def _unpack(content: bytes, key: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Return the parts of a sealed bundle; `ValueError` for one that is damaged or was sealed by somebody else."""
    body, seal = content[:-32], content[-32:]
    if not body.startswith(_MAGIC) or not hmac.compare_digest(_seal(body, key), seal):
        raise ValueError("it is damaged, or was not written by this user")
    start = len(_MAGIC) + 8
    (length,) = struct.unpack("<Q", body[len(_MAGIC) : start])
    index = json.loads(body[start : start + length])
    offset = start + length + index["artifacts"]
    artifacts, libraries = body[start + length : offset], {}
    for name, size in index["libraries"].items():
        libraries[name], offset = body[offset : offset + size], offset + size
    return artifacts, libraries


def _seal(body: bytes, key: bytes) -> bytes:
    return hmac.new(key, body, hashlib.sha256).digest()


def _make_private(folder: Path) -> None:
    """The folder, for this user only."""
    with explained_storage(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)


def _check_private(path: Path) -> None:
    """`ValueError` unless `path` is no link, is this user's, and others cannot write (folder) or read it (file)."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise ValueError(f"{path} is a link")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise ValueError(f"{path} belongs to another user")
    refused = 0o022 if stat.S_ISDIR(found.st_mode) else 0o077
    if os.name == "posix" and found.st_mode & refused:
        raise ValueError(f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):o}); close it with chmod go-rwx")


def _read_private(path: Path) -> bytes:
    if path.parent.exists():
        _check_private(path.parent)
    if path.exists():
        _check_private(path)
    return path.read_bytes()


def _read_key(folder: Path) -> bytes:
    """Return the key of this folder, made at the first use; of two processes that make one, the first one's holds."""
    path = folder / _KEY_NAME
    if not path.exists():
        temporary = folder / f".{_KEY_NAME}.{secrets.token_hex(4)}.tmp"
        with explained_storage(path):
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(_KEY_BYTES))
                _link_first(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    key = _read_private(path)
    if len(key) != _KEY_BYTES:
        raise ValueError(f"{path} is damaged; delete the folder {folder}")
    return key


def _link_first(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path` unless another process was first."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return


def _collect_artifacts() -> bytes:
    """Return everything that torch compiled in this process, in its portable form; empty where it compiled nothing."""
    import torch

    collected = torch.compiler.save_cache_artifacts()
    return b"" if collected is None else collected[0]


def _hand_to_torch(content: bytes) -> int:
    """Fill torch's caches with the compiled graphs in `content`, and with nothing else that it may hold."""
    from torch.compiler._cache import CacheArtifactManager

    artifacts = CacheArtifactManager.deserialize(content)
    if artifacts is None:
        _warn("compiled code of an earlier process is ignored (torch cannot read it); it is compiled again")
        return 0
    kept = {kind: entries for kind, entries in artifacts.items() if kind in _KINDS}
    CacheArtifactManager.populate_caches(kept)
    return sum(len(entries) for kind, entries in kept.items() if kind == "inductor")


def _collect_libraries() -> dict[str, bytes]:
    """Return the compiled CPU libraries that this process loaded, by file name."""
    return {path.name: path.read_bytes() for path in _loaded_libraries() if _LIBRARY_NAME.fullmatch(path.name)}


def _loaded_libraries() -> Iterable[Path]:
    from torch._inductor import codecache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    root = Path(cache_dir())
    kinds = (codecache.CppCodeCache, codecache.CppPythonBindingsCodeCache, codecache.CppWrapperCodeCache)
    keys = {key for kind in kinds for key in kind.cache}
    return sorted(path for key in keys for path in (root / key[1:3]).glob(f"{key}*.so"))


def _place_libraries(libraries: dict[str, bytes]) -> None:
    """Put libraries where torch looks before it compiles; those that are there stay."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name, content in libraries.items():
        path = Path(cache_dir()) / name[1:3] / name
        if _LIBRARY_NAME.fullmatch(name) and not path.exists():
            write_file(path, content)
            path.chmod(0o700)


def _processor_flags() -> str:
    """Return a hash of the processor's instruction sets, where the system tells; code is compiled for exactly these."""
    flags = list_processor_flags()
    return hashlib.sha256(" ".join(flags).encode()).hexdigest() if flags else ""


def _warn(message: str) -> None:
    warnings.warn(message, CompiledCacheWarning, stacklevel=4)
