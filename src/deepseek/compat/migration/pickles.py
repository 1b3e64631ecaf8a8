"""What a pickle would do, read from its opcodes and never run.

A pickle is a program that can import any function and call it. `read_pickle` lists every global it names: of a plain
pickle, of the older files of `torch.save` (several pickles in a row) and of the newer ones (a zip with `data.pkl`).
Globals that rebuild tensors are known and harmless; any other one is a call of foreign code, and one that cannot be
told from the opcodes counts as such.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deepseek.core.errors import CorruptArtifactError

SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_MAX_PICKLE_BYTES = 64_000_000
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
    *(zipfile.BadZipFile, zlib.error, struct.error),
)

_HARMLESS = re.compile(
    r"collections\.OrderedDict"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\.(storage\.)?(\w+Storage|Size|device)"
    r"|torch\.(float16|float32|float64|bfloat16|int8|int16|int32|int64|uint8|bool|float8_\w+)"
    r"|torch\.nn\.parameter\.Parameter"
    r"|numpy\.(ndarray|dtype)|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|_codecs\.encode|builtins\.(set|frozenset|bytearray|complex|slice|range)"
)


@dataclass(frozen=True)
class PickleContent:
    """The globals a file names (`module.name`), and of these the ones that no tensor needs."""

    globals: tuple[str, ...]

    @property
    def foreign(self) -> tuple[str, ...]:
        """Globals that would run code which is not part of a checkpoint."""
        return tuple(each for each in self.globals if not _HARMLESS.fullmatch(each))


def read_pickle(path: Path) -> PickleContent:
    """The globals of every pickle in a file. Raises `CorruptArtifactError` for a file that is none, or too large."""
    try:
        found = [name for content in _zipped(path) for name in _globals(io.BytesIO(content))]
        with path.open("rb") as file:
            # An archive can stand behind a pickle in one file; which of them runs is up to who loads it, so read both.
            is_archive = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            found += [] if is_archive else list(_globals_in_a_row(file))
    except _BROKEN as error:
        raise CorruptArtifactError(f"{path} is not a readable pickle ({error}); copy it again or exclude it") from error
    return PickleContent(tuple(dict.fromkeys(found)))


def looks_like_pickle(path: Path) -> bool:
    """Whether a file begins as pickles since protocol 2 and archives do; a `.bin` may be anything else."""
    with path.open("rb") as file:
        return file.read(2)[:1] == b"\x80" or zipfile.is_zipfile(path)


def _zipped(path: Path) -> Iterator[bytes]:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = [each for each in archive.infolist() if each.filename.endswith(".pkl")]
        if not names:
            raise ValueError("the archive holds no .pkl")
        for entry in names:
            if entry.file_size > _MAX_PICKLE_BYTES or entry.flag_bits & 1:
                raise ValueError(f"{entry.filename} announces {entry.file_size} bytes or is encrypted")
            with archive.open(entry) as file:
                yield file.read(_MAX_PICKLE_BYTES)


def _globals_in_a_row(file: IO[bytes]) -> Iterator[str]:
    yield from _globals(file)
    for _ in range(_MAX_PICKLES - 1):
        at = file.tell()
        # Every pickle of protocol 2 and later begins so; what follows the last one is raw data.
        if file.read(1) != b"\x80":
            return
        file.seek(at)
        yield from _globals(file)


def _globals(file: IO[bytes]) -> Iterator[str]:
    """`module.name` of every global. STACK_GLOBAL takes the two strings pushed last, which may come from the memo."""
    pushed: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "GLOBAL" | "INST":
                yield str(argument).replace(" ", ".")
                pushed.append("?")
            case "STACK_GLOBAL":
                yield ".".join(pushed[-2:]) if len(pushed) >= 2 else "?"
                pushed.append("?")
            case "EXT1" | "EXT2" | "EXT4":
                yield f"copyreg extension {argument}"
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
