"""Documents tokenized once, kept on disk as numbers, and mapped into memory.

    for event in build_token_cache(corpus, tokenizer, folder):   # reuses a folder that still fits
        show(event)
    cache = load_token_cache(folder)

A cache is a folder with these files, written whole or not at all:

    tokens.bin      all tokens in the order of the documents, little-endian, uint16 where the vocabulary allows
    starts.npy      int64; document i is tokens[starts[i]:starts[i + 1]] and ends with the tokenizer's end token
    learned.bin     a byte for each token, 1 where it is to be predicted; only where that is not all of them
    manifest.json   digests of the documents and the tokenizer, counts, size and SHA-256 of the other files

A folder is reused when its bytes are the ones that were written and both digests still fit. The documents' digest is
over names and texts, so a changed corpus is noticed whatever its dates say; a damaged folder is made again with a
warning. Several processes must not build one folder at the same time: let rank 0 build and the others load.

Cost: building 10 MB of text takes 2.2 s on two cores, of which tokenizing is 1.7; finding that it can be reused takes
one read of the corpus. A text file of any size is tokenized in pieces, so memory stays a few times one document.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.config import Config
from deepseek.core.errors import DataError
from deepseek.core.events import Event
from deepseek.core.storage import new_folder, sha256_of
from deepseek.data.documents import Document
from deepseek.data.tokenizing import Tokenizer

SCHEMA_VERSION = 1
TOKENS_FILE, STARTS_FILE, LEARNED_FILE, MANIFEST_FILE = "tokens.bin", "starts.npy", "learned.bin", "manifest.json"

# Characters tokenized at once: enough to keep all cores busy, and little beside a document.
_BATCH_CHARACTERS = 1 << 20
# Longer texts are cut after a line end, where two passes give the same tokens as one but for runs of blank lines.
_PIECE_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class TokenizingProgress(Event):
    """Text went into a cache."""

    num_documents: int
    num_tokens: int
    num_text_bytes: int
    total_bytes: int | None
    """Bytes to expect in all, where the caller knows."""


@dataclass(frozen=True)
class CacheReady(Event):
    """A cache can be loaded."""

    folder: str
    num_documents: int
    num_tokens: int
    num_text_bytes: int
    num_undecodable: int
    """Places where bytes that are not UTF-8 were replaced."""
    num_undecodable_documents: int
    is_reused: bool


class StoredFile(Config):
    """The expected size and checksum of a file of the cache."""

    size_bytes: int
    """Its length in bytes."""
    sha256: str
    """Hex SHA-256 of its bytes."""


class CacheManifest(Config):
    """The contents of a cache and the sources it was made from."""

    schema_version: int
    """Version of this format."""
    documents_digest: str
    """SHA-256 over the names and texts."""
    tokenizer_digest: str
    """SHA-256 of the tokenizer that made the tokens, and of how it was used where that was not plainly."""
    vocab_size: int
    """All tokens are below it."""
    token_dtype: str
    """numpy's name for how a token is stored: `<u2` or `<u4`."""
    num_documents: int
    """Documents in the cache."""
    num_tokens: int
    """Tokens in the cache, end tokens included."""
    num_text_bytes: int
    """Bytes of the text in UTF-8."""
    num_undecodable: int
    """Places where bytes that are not UTF-8 were replaced."""
    num_undecodable_documents: int
    """Documents with such places."""
    files: dict[str, StoredFile]
    """The other files of the cache, by name."""
    notes: tuple[str, ...] = ()
    """What was said of documents that are left out, and is said again where the cache is used again."""


@dataclass(frozen=True, eq=False)
class TokenCache:
    """Tokens of all documents, one after the other; `tokens` is read from disk as it is touched."""

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    manifest: CacheManifest
    learned: NDArray[np.bool_] | None = None
    """Of each token whether it is to be predicted; `None` means all."""

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.starts) - 1

    @property
    def digest(self) -> str:
        """SHA-256 that names this sequence of tokens."""
        return hashlib.sha256((self.manifest.documents_digest + self.manifest.tokenizer_digest).encode()).hexdigest()

    def document(self, index: int) -> NDArray[Any]:
        """Return the tokens of one document, its end token included."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True, eq=False)
class EncodedPiece:
    """Tokens of a document, or of a part of it."""

    ids: Sequence[int]
    is_last: bool
    """Whether its document ends here."""
    learned: NDArray[np.bool_] | None = None
    """Of each token whether it is to be predicted; `None` means all."""


class DocumentEncoder(Protocol):
    """How documents become tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Where the tokens are from."""

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides which tokens a document becomes."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of documents that are left out, once all are encoded."""

    def encode(self, documents: Iterable[Document]) -> Iterator[list[EncodedPiece]]:
        """Return the tokens of all documents in their order, some pieces at a time."""


@dataclass(frozen=True, eq=False)
class PlainEncoder:
    """Encodes texts as they are, each with the end token behind it."""

    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """That of the tokenizer."""
        return self.tokenizer.digest

    def encode(self, documents: Iterable[Document]) -> Iterator[list[EncodedPiece]]:
        """Encode texts on all cores, long ones in pieces."""
        for pieces in _batches(_cut(documents)):
            all_ids = self.tokenizer.encode_batch([text for text, _ in pieces])
            yield [
                EncodedPiece([*ids, self.tokenizer.eos_id] if is_last else ids, is_last)
                for ids, (_, is_last) in zip(all_ids, pieces, strict=True)
            ]


def build_token_cache(
    documents: Iterable[Document],
    tokenizer: Tokenizer | DocumentEncoder,
    folder: Path,
    *,
    total_bytes: int | None = None,
) -> Iterator[TokenizingProgress | CacheReady]:
    """Tokenize `documents` into `folder` unless it holds them already; the last event is `CacheReady`.

    A tokenizer encodes texts as they are; a `DocumentEncoder` encodes documents in its own way. `documents` are read
    twice where an older cache stands, so they must be a `Corpus` or a list, not an iterator.
    Raises `DataError` for documents without text and for a folder that holds something else.
    """
    if iter(documents) is documents:
        raise DataError("documents can be read only once; give a Corpus or a list, since a cache may read them twice")
    encoder = PlainEncoder(tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer
    manifest = _find_reusable(documents, encoder, folder)
    is_reused = manifest is not None
    if manifest is None:
        with new_folder(folder) as temporary:
            yield from _write(documents, encoder, temporary, total_bytes)
        manifest = _read_manifest(folder)
    for note in manifest.notes:
        warn_caller(note)
    yield CacheReady(
        folder=str(folder),
        num_documents=manifest.num_documents,
        num_tokens=manifest.num_tokens,
        num_text_bytes=manifest.num_text_bytes,
        num_undecodable=manifest.num_undecodable,
        num_undecodable_documents=manifest.num_undecodable_documents,
        is_reused=is_reused,
    )


def load_token_cache(folder: Path, *, is_verified: bool = False) -> TokenCache:
    """Map a cache into memory, after comparing its bytes with the manifest's sums unless `is_verified` says it was.

    Raises `DataError` for a folder that is missing or damaged.
    """
    problem = None if is_verified else find_damage(folder)
    if problem:
        raise DataError(f"token cache {folder} cannot be used: {problem}; delete the folder and build it again")
    manifest = _read_manifest(folder)
    return TokenCache(
        tokens=np.memmap(folder / TOKENS_FILE, dtype=np.dtype(manifest.token_dtype), mode="r"),
        starts=np.load(folder / STARTS_FILE, allow_pickle=False),
        manifest=manifest,
        learned=np.memmap(folder / LEARNED_FILE, dtype=bool, mode="r") if LEARNED_FILE in manifest.files else None,
    )


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a cache, or `None`. Cost: one read of its files."""
    try:
        manifest = _read_manifest(folder)
    except DataError as error:
        return str(error)
    for name in dict.fromkeys((TOKENS_FILE, STARTS_FILE, *manifest.files)):
        path, stored = folder / name, manifest.files.get(name)
        if stored is None or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != stored.size_bytes:
            return f"{name} has {path.stat().st_size} bytes where {stored.size_bytes} were written"
        if sha256_of(path) != stored.sha256:
            return f"{name} does not hold the bytes that were written"
    return None


def digest_documents(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts, in their order."""
    tally = _Tally()
    for _ in tally.watch(documents):
        pass
    return str(tally.digest.hexdigest())


def _find_reusable(documents: Iterable[Document], encoder: DocumentEncoder, folder: Path) -> CacheManifest | None:
    """Return the manifest of a whole cache of these documents in `folder`; refuses a folder that is none of ours."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, where a token cache is a folder; choose another path")
    if not any(folder.iterdir()):
        return None
    foreign = {entry.name for entry in folder.iterdir()} - {TOKENS_FILE, STARTS_FILE, LEARNED_FILE, MANIFEST_FILE}
    if foreign:
        raise DataError(f"{folder} holds {sorted(foreign)[0]!r}, so it is no token cache; choose another folder")
    if problem := find_damage(folder):
        warnings.warn(f"token cache {folder} cannot be used and is built again: {problem}", stacklevel=3)
        return None
    manifest = _read_manifest(folder)
    if manifest.tokenizer_digest != encoder.digest:
        return None
    return manifest if manifest.documents_digest == digest_documents(documents) else None


def _read_manifest(folder: Path) -> CacheManifest:
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={values.get('schema_version')} where this deepseek writes {SCHEMA_VERSION}"
            )
        return CacheManifest.from_dict(values)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:  # a ConfigError is a ValueError
        raise DataError(f"{path} cannot be read ({error})") from error


@dataclass
class _Tally:
    """Counts what passes on its way from the corpus to the tokenizer."""

    digest: Any = field(default_factory=hashlib.sha256)
    num_documents: int = 0
    num_text_bytes: int = 0
    num_undecodable: int = 0
    num_undecodable_documents: int = 0

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            text = document.text.encode()
            name = document.name.encode("utf-8", "surrogateescape")
            self.digest.update(b"%d:%d:" % (len(name), len(text)) + name + text)
            self.num_documents += 1
            self.num_text_bytes += len(text)
            self.num_undecodable += document.num_undecodable
            self.num_undecodable_documents += document.num_undecodable > 0
            yield document


def _write(
    documents: Iterable[Document], encoder: DocumentEncoder, folder: Path, total_bytes: int | None
) -> Iterator[TokenizingProgress]:
    """Fill `folder` with the files, saying how far it is after each batch of text."""
    dtype = np.dtype("<u2" if encoder.tokenizer.vocab_size <= 1 << 16 else "<u4")
    tally, ends, num_tokens = _Tally(), [0], 0
    with (folder / TOKENS_FILE).open("wb") as file, (folder / LEARNED_FILE).open("wb") as learned_file:
        for pieces in encoder.encode(tally.watch(documents)):
            for piece in pieces:
                file.write(np.asarray(piece.ids, dtype=dtype).tobytes())
                num_tokens += len(piece.ids)
                if piece.learned is not None:
                    learned_file.write(piece.learned.tobytes())
                if piece.is_last:
                    ends.append(num_tokens)
            yield TokenizingProgress(len(ends) - 1, num_tokens, tally.num_text_bytes, total_bytes)
    if tally.num_documents == 0:
        raise DataError("there is no document to tokenize; name a source that holds text")
    if not (folder / LEARNED_FILE).stat().st_size:
        (folder / LEARNED_FILE).unlink()
    np.save(folder / STARTS_FILE, np.asarray(ends, dtype=np.int64), allow_pickle=False)
    _write_manifest(folder, encoder, tally, ends, dtype)


def _write_manifest(
    folder: Path, encoder: DocumentEncoder, tally: _Tally, ends: list[int], dtype: np.dtype[Any]
) -> None:
    paths = [folder / name for name in (TOKENS_FILE, STARTS_FILE, LEARNED_FILE) if (folder / name).exists()]
    manifest = CacheManifest(
        schema_version=SCHEMA_VERSION,
        documents_digest=tally.digest.hexdigest(),
        tokenizer_digest=encoder.digest,
        vocab_size=encoder.tokenizer.vocab_size,
        token_dtype=dtype.str,
        num_documents=len(ends) - 1,
        num_tokens=ends[-1],
        num_text_bytes=tally.num_text_bytes,
        num_undecodable=tally.num_undecodable,
        num_undecodable_documents=tally.num_undecodable_documents,
        files={path.name: StoredFile(size_bytes=path.stat().st_size, sha256=sha256_of(path)) for path in paths},
        notes=encoder.notes,
    )
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest.to_dict(), indent=2), encoding="utf-8")


def _cut(documents: Iterable[Document]) -> Iterator[tuple[str, bool]]:
    """The texts in pieces, each with whether it is the last of its document."""
    for document in documents:
        text, begin = document.text, 0
        while len(text) - begin > _PIECE_CHARACTERS:
            end = text.rfind("\n", begin, begin + _PIECE_CHARACTERS) + 1 or begin + _PIECE_CHARACTERS
            yield text[begin:end], False
            begin = end
        yield text[begin:], True


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    num_characters = 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece[0])
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
