"""The effects that a pickle would have, read from its opcodes and never run.

A pickle is a program that can import any function and call it. `read_pickle` lists every global it names: of a plain
pickle, of the older files of `torch.save` (a tar, then several pickles in a row) and of the newer ones (a zip with
`data.pkl`).
Globals that rebuild tensors are known and harmless; any other one is a call of foreign code, and one that cannot be
told from the opcodes counts as such.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from deepseek.core.errors import CorruptArtifactError

SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_MAX_PICKLE_BYTES = 64_000_000
_MAX_VALUE_BYTES = 1_000_000
# A tensor takes some fifty operations; a plain pickle of lists takes one for each number.
_MAX_OPCODES = 5_000_000
_ZIP_START = b"PK\x03\x04"
# A file of the older `torch.save` holds a magic number, a version, facts about the system, the object and its keys.
_MAX_PICKLES = 5

# What the standard library's readers raise for damaged bytes; a length of terabytes is a MemoryError.
_BROKEN = (
    *(
        ValueError,
        KeyError,
        IndexError,
        EOFError,
        OverflowError,
        OSError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
    ),
    *(zipfile.BadZipFile, zlib.error, struct.error, tarfile.TarError),
)

_HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|qtensor"
    r"|sparse_csr_tensor|nested_tensor|meta_tensor_no_storage)"
    r"|torch\.(storage\.)?(\w+Storage|Size|device)|torch\.serialization\._get_layout"
    r"|torch\.(u?int(8|16|32|64)|qu?int(8|32)|quint4x2|quint2x4|float16|float32|float64|bfloat16|bool"
    r"|complex(32|64|128)|float8_\w+)"
    r"|torch\.per_(tensor|channel)_(affine|symmetric)|torch\.per_channel_affine_float_qparams"
    r"|torch\.(strided|sparse_(coo|csr|csc|bsr|bsc)|contiguous_format|channels_last|preserve_format)"
    r"|torch\.nn\.parameter\.(Parameter|Buffer|UninitializedParameter)"
    r"|numpy\.(ndarray|dtype)|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|frozenset|bytearray|complex|slice|range|list|dict|tuple|int|float|bool|str|bytes)"
)
_CALLS = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"}


@dataclass(frozen=True)
class PickleContent:
    """The globals a file names (`module.name`), and of these the ones that no tensor needs."""

    globals: tuple[str, ...]

    @property
    def foreign(self) -> tuple[str, ...]:
        """Globals that would run code which is not part of a checkpoint."""
        return tuple(name for name in self.globals if not _HARMLESS.fullmatch(name))


def read_pickle(path: Path) -> PickleContent:
    """Return the globals of every pickle in a file: of a plain one, of several in a row, and in archives.

    A pickle runs as it is read, so what it names before its bytes break counts. Raises `CorruptArtifactError` for a
    file that is broken or no pickle and would call nothing foreign, and for one that is too large for a checkpoint.
    """
    trace = _Trace()
    with path.open("rb") as file:
        start = file.read(4)
    try:
        # An archive can stand behind a pickle in one file; which of them runs is up to the loader, so both are read.
        has_archive = _read_archives(path, trace)
        if not has_archive or not (start == _ZIP_START or _is_tar(path)):
            if start == _ZIP_START:
                raise ValueError("the archive is truncated")
            with path.open("rb") as file:
                _read_in_a_row(_BoundedFile(file, path.stat().st_size), trace)
    except _BROKEN as error:
        # Text can look like a name of the oldest protocol; it would have to be called to do harm.
        if trace.content.foreign and (trace.num_calls or start[:1] == b"\x80"):
            return trace.content
        raise CorruptArtifactError(f"{path} is not a readable pickle ({error}); copy it again or exclude it") from error
    return trace.content


def looks_like_pickle(path: Path) -> bool:
    """Whether a file begins as pickles since protocol 2 and archives do; a `.bin` may be anything else."""
    with path.open("rb") as file:
        return file.read(2)[:1] == b"\x80" or zipfile.is_zipfile(path) or _is_tar(path)


@dataclass
class _Trace:
    """The names and calls found in the pickles of a file so far."""

    names: list[str] = field(default_factory=list)
    num_calls: int = 0
    num_opcodes: int = 0

    @property
    def content(self) -> PickleContent:
        """The names, each once."""
        return PickleContent(tuple(dict.fromkeys(self.names)))


class _SkippedBytes(bytes):
    """Stands for bytes that were skipped: nothing so long can be the name of a function."""

    length: int

    def __len__(self) -> int:
        return self.length


class _BoundedFile:
    """A file whose long values are skipped, so that reading a pickle of gigabytes takes no memory."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        self.file = file
        self.num_bytes = num_bytes
        self.tell = file.tell
        self.seek = file.seek

    def read(self, count: int) -> bytes:
        """Read so many bytes, or skip them."""
        if count <= _MAX_VALUE_BYTES or self.file.tell() + count > self.num_bytes:
            return self.file.read(min(count, _MAX_VALUE_BYTES))
        self.file.seek(count, io.SEEK_CUR)
        skipped = _SkippedBytes()
        skipped.length = count
        return skipped

    def readline(self) -> bytes:
        """Read a line of bounded length."""
        return self.file.readline(_MAX_VALUE_BYTES)


def _is_tar(path: Path) -> bool:
    """Whether torch would read a file as a tar, which is one without compression."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except _BROKEN:
        return False


def _read_archives(path: Path, trace: _Trace) -> bool:
    """Read the pickles in a zip, as `torch.save` writes, or in a tar, as it did before 2017; say whether it is one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # The reader of torch looks names up without regard to case.
            entries = [entry for entry in archive.infolist() if entry.filename.lower().endswith((".pkl", ".pickle"))]
            if not entries:
                raise ValueError("the archive holds no .pkl")
            for entry in entries:
                if entry.flag_bits & 1:
                    raise ValueError(f"{entry.filename} is encrypted")
                with archive.open(entry) as member:
                    _read_member(entry.filename, entry.file_size, member, trace)
        return True
    if not _is_tar(path):
        return False
    with tarfile.open(path, "r:") as tar:
        if tar.next() is None:  # zeros alone make a tar
            raise ValueError("the archive is empty")
        for part in tar:
            content = tar.extractfile(part) if part.isreg() else None
            if content is not None:
                # Numbers of tensors and their names are pickles, too, with raw data between them.
                _read_member(part.name, min(part.size, _MAX_PICKLE_BYTES), content, trace)
    return True


def _read_member(name: str, num_bytes: int, member: IO[bytes], trace: _Trace) -> None:
    if num_bytes > _MAX_PICKLE_BYTES:
        raise ValueError(f"{name} announces {num_bytes} bytes")
    content = member.read(_MAX_PICKLE_BYTES)
    _read_in_a_row(_BoundedFile(io.BytesIO(content), len(content)), trace)


def _read_in_a_row(file: _BoundedFile, trace: _Trace) -> None:
    """Read up to `_MAX_PICKLES`; what follows the last one is raw data, and may end in any way."""
    for number in range(_MAX_PICKLES):
        at = file.tell()
        start = file.read(1)
        file.seek(at)
        if not start and number:
            return
        is_needed = not number or start == b"\x80"
        try:
            _read_globals(file, trace)
        except _BROKEN:
            if is_needed:
                raise
            return


def _read_globals(file: _BoundedFile, trace: _Trace) -> None:
    """Add `module.name` of every global. STACK_GLOBAL takes the two strings pushed last, also from the memo."""
    pushed: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]  # it reads and tells, no more
        trace.num_opcodes += 1
        trace.num_calls += opcode.name in _CALLS
        if trace.num_opcodes > _MAX_OPCODES:
            raise ValueError(f"more than {_MAX_OPCODES} operations, which no checkpoint needs")
        match opcode.name:
            case "GLOBAL" | "INST":
                trace.names.append(str(argument).replace(" ", "."))
                pushed.append("?")
            case "STACK_GLOBAL":
                trace.names.append(".".join(pushed[-2:]) if len(pushed) >= 2 else "?")
                pushed.append("?")
            case "EXT1" | "EXT2" | "EXT4":
                trace.names.append(f"copyreg extension {argument}")
                pushed.append("?")
            case "MEMOIZE":
                memo[len(memo)] = pushed[-1] if pushed else "?"
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[int(argument or 0)] = pushed[-1] if pushed else "?"
            case "GET" | "BINGET" | "LONG_BINGET":
                pushed.append(memo.get(int(argument or 0), "?"))
            case "POP" | "DUP" | "POP_MARK":
                # What lies below is not tracked, so nothing pushed before may be trusted as a name.
                pushed.append("?")
            case name if "UNICODE" in name or "STRING" in name:
                pushed.append(str(argument))
            case "PROTO" | "FRAME" | "MARK":
                pass
            case _:
                pushed.append("?")
