"""Text in: documents from folders, globs, single files, JSONL and Parquet, on this machine or behind a URL.

    Corpus(("stdlib",))                      the source files of the running Python's standard library
    Corpus(("notes/", "more/**/*.md"))       folders and globs: each file is one document
    Corpus(("s3://bucket/part-*.jsonl.gz",)) each line is one document (each row, in Parquet)

A corpus is a value that can be read as often as needed: sources in the order given, files sorted by name, so the same
files give the same documents in the same order everywhere. Opening and decompressing are fsspec's work.

Which files are read (documents.py says how):
- Files and folders whose name starts with a dot are left out, and so are documents without any text.
- Links are followed, to files and to folders. A file that has several names (links, hard links, sources that overlap)
  is read once, under the first of them, so that it cannot lie on both sides of the split.
- What a link does not lead to, what is no file (a pipe, a device), and files that hold no text (images) are left out of
  folders and globs with a warning that names them. Named as a source, they are refused.
- `stdlib` is every `.py` file of the standard library without installed packages, without tests (Linux distributions
  package them apart, and some are broken on purpose), and without generated files: the 0.8 MB help text in
  `pydoc_data` and the character tables in `encodings`. With these, what a discounted bigram reaches on
  held-out text depends on where they fall: 4.2 to 4.8 nats a token over three splits, against 4.4 to 4.6 over four
  without them. 9.9 MB in Python 3.11.

Whether a document is for training or held out follows from a hash of its name alone, so adding, removing or reordering
other documents moves none across. Cost: one read of the files; 10 MB take 0.2 s.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import posixpath
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import DataError
from deepseek.data.documents import Document, NotTextError, SourceFile, read_documents

STDLIB = "stdlib"
ALL, TRAIN, HELDOUT = "all", "train", "held-out"

_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
_GENERATED = {"pydoc_data", "encodings"}
_MOST_NAMED = 3  # files that a warning names


@dataclass(frozen=True)
class Corpus:
    """Documents of several sources, or the training or held-out part of them.

    Iterating reads them and raises `DataError` where a source is missing, unreadable or malformed, or where there is
    no document at all.

    >>> sum(document.text.count("def ") for document in Corpus(("stdlib",))) > 10_000
    True
    """

    sources: tuple[str, ...]
    text_field: str = "text"
    """Field of a JSONL object, or column of a Parquet file, that holds the text."""
    document_separator: str | None = None
    """Cuts plain text files into several documents; `None` makes each file one document."""
    heldout_fraction: float = 0.0
    """Share of documents that are held out, from 0 to 1."""
    part: str = ALL
    """Which documents this is: `all`, `train` or `held-out`."""
    excluded: frozenset[str] = frozenset()
    """Identities of files that are not read."""
    said: set[str] = field(default_factory=set, compare=False, repr=False)
    """Warnings that this corpus and its parts gave, each of them once."""

    def split(self, heldout_fraction: float) -> tuple[Corpus, Corpus]:
        """Split into the training part and the held-out part; together they are this corpus."""
        return (
            replace(self, heldout_fraction=heldout_fraction, part=TRAIN),
            replace(self, heldout_fraction=heldout_fraction, part=HELDOUT),
        )

    def has_part(self, name: str) -> bool:
        """Return whether the document called `name` belongs to this part."""
        return self.part == ALL or is_heldout(name, self.heldout_fraction) == (self.part == HELDOUT)

    def list_files(self) -> list[SourceFile]:
        """Return the files that have to be read for this part, without reading them."""
        firsts: dict[str, SourceFile] = {}
        for source in self.sources:
            for file in list_source(source, self.said):
                firsts.setdefault(file.identity, file)
        files = [replace(file, said=self.said) for identity, file in firsts.items() if identity not in self.excluded]
        return [file for file in files if not self._is_one_document(file) or self.has_part(file.name)]

    def num_bytes(self) -> int:
        """Size of `list_files` on disk, bytes, as they lie there (compressed, with JSON around the text)."""
        return sum(file.size_bytes for file in self.list_files())

    def __iter__(self) -> Iterator[Document]:
        num_documents = 0
        no_texts: list[str] = []
        for file in self.list_files():
            try:
                for document in read_documents(file, text_field=self.text_field, separator=self.document_separator):
                    if self.has_part(document.name) and document.text and not document.text.isspace():
                        num_documents += 1
                        yield document
            except NotTextError:
                if file.is_named:
                    raise
                no_texts.append(file.path)
        if no_texts:
            _warn_once(f"no text is in {name_some(no_texts)}, which is left out", self.said)
        if num_documents == 0:
            raise DataError(self._explain_emptiness())

    def _is_one_document(self, file: SourceFile) -> bool:
        return not file.may_be_table and self.document_separator is None

    def _explain_emptiness(self) -> str:
        where = ", ".join(self.sources) or "an empty list of sources"
        if self.part == ALL:
            return f"there is no text in {where}; name a folder, a glob or a file that holds some"
        return (
            f"no document of {where} falls into the {self.part} part at heldout_fraction={self.heldout_fraction}; "
            "change the fraction (0 trains on all of it), cut long files with document_separator, or name "
            "heldout_sources"
        )


def is_heldout(name: str, fraction: float) -> bool:
    """Return whether the document called `name` is held out, by a hash that is uniform on [0, 1).

    >>> is_heldout("json/decoder.py", 0.0), is_heldout("json/decoder.py", 1.0)
    (False, True)
    """
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") < fraction * 2**64
    )


def list_source(source: str, said: set[str] | None = None) -> list[SourceFile]:
    """Return the files of one source, sorted by name; raises `DataError` when there is none.

    Warnings that are in `said` are not given again.
    """
    said = set() if said is None else said
    if not source.strip():
        raise DataError("a source is an empty text; name a folder, a glob or a file, '.' for the folder you are in")
    files = _list_stdlib() if source == STDLIB else _list_url(source, said)
    if not files:
        raise DataError(
            f"source {source!r} holds no file; check the path, it counts from {Path.cwd()} if it is relative"
        )
    firsts: dict[str, SourceFile] = {}
    for file in sorted(files, key=lambda file: file.name):
        firsts.setdefault(file.identity, file)
    return list(firsts.values())


def _list_stdlib() -> list[SourceFile]:
    import fsspec

    root, local = sysconfig.get_paths()["stdlib"], fsspec.filesystem("file")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in _INSTALLED | _TESTS | _GENERATED]
        paths = [Path(folder) / name for name in names if name.endswith(".py")]
        files += [SourceFile(p.relative_to(root).as_posix(), str(p), p.stat().st_size, local) for p in paths]
    return files


def _list_url(source: str, said: set[str]) -> list[SourceFile]:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, path = fsspec.url_to_fs(source)
        if isinstance(filesystem, LocalFileSystem):
            return _list_local(filesystem, path, said)
        root, found = _find(filesystem, path)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"source {source!r} cannot be opened ({error}); check the path or URL") from error
    named = {posixpath.relpath(found_path, root): info for found_path, info in found.items() if info["type"] == "file"}
    return [
        SourceFile(name, info["name"], info["size"] or 0, filesystem, is_named=list(found) == [path])
        for name, info in named.items()
        if not any(part.startswith(".") for part in name.split("/"))
    ]


def _find(filesystem: Any, path: str) -> tuple[str, dict[str, Any]]:
    """Return the folder that names count from, and what is in it: a file, a glob's matches, or all of it."""
    if filesystem.isfile(path):
        return posixpath.dirname(path), {path: filesystem.info(path)}
    if not glob.has_magic(path):
        return path, filesystem.find(path, detail=True)
    return _fixed_part(path), filesystem.glob(path, detail=True)


def _fixed_part(pattern: str) -> str:
    """Return the folder in which all that `pattern` matches lies.

    >>> _fixed_part("/notes/2*/**/*.md")
    '/notes'
    """
    parts = pattern.split("/")
    return "/".join(parts[: next(depth for depth, part in enumerate(parts) if glob.has_magic(part))]) or "/"


def _list_local(filesystem: Any, path: str, said: set[str]) -> list[SourceFile]:
    """Like `_find`, and through links, which fsspec leaves out without a word."""
    from fsspec.utils import glob_translate

    if Path(path).is_file():
        return [SourceFile(Path(path).name, path, Path(path).stat().st_size, filesystem, is_named=True)]
    if os.path.lexists(path) and not Path(path).is_dir():
        kind = "a link that leads to no file" if Path(path).is_symlink() else "a pipe, a device or a socket"
        raise OSError(f"it is {kind}")
    root, matches, depth = path, re.compile(""), None
    if glob.has_magic(path) and not Path(path).is_dir():
        root, matches = _fixed_part(path), re.compile(glob_translate(path))
        depth = None if "**" in path else path.count("/") - root.rstrip("/").count("/")
    found = list(walk_files(root, depth)) if Path(root).is_dir() else []
    found = [(path, is_file) for path, is_file in found if matches.match(path)]
    if strange := sorted(path for path, is_file in found if not is_file):
        _warn_once(f"neither a file nor a folder is {name_some(strange)}, which is left out", said)
    return [
        SourceFile(posixpath.relpath(path, root), path, Path(path).stat().st_size, filesystem)
        for path, is_file in found
        if is_file
    ]


def walk_files(
    folder: str, depth: int | None = None, *, above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, bool]]:
    """Yield every visible path below `folder` that is no folder, and whether it is a file.

    Each folder is sorted, what lies right in it first; links to folders above are no files. `depth` bounds the levels;
    `above` holds the real paths of the folders on the way here.
    """
    above |= {os.path.realpath(folder)}
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = f"{folder.rstrip('/')}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield path, Path(path).is_file()
            elif os.path.realpath(path) in above:
                yield path, False
            else:
                folders.append(path)
    if depth is None or depth > 1:
        for path in folders:
            yield from walk_files(path, None if depth is None else depth - 1, above=above)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or leads to one; links in a circle lead nowhere."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _warn_once(message: str, said: set[str]) -> None:
    if message not in said:
        said.add(message)
        warn_caller(message)


def name_some(paths: list[str]) -> str:
    """Return the first of `paths`, and how many more there are.

    >>> name_some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(paths) - _MOST_NAMED
    return ", ".join(paths[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
