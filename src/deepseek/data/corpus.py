"""From a `DataConfig` to a tokenizer and two token caches: everything a training run needs from its text.

    for event in prepare_data(config, folder):
        show(event)
    data = load_data(config, folder)         # data.tokenizer, data.train, data.heldout

    corpus -> training part -> tokenizer (trained, or loaded) -> folder/tokenizer
           `-> training part, held-out part -> token caches   -> folder/train, folder/heldout

Called by recipes and by `deepseek train`. Done twice with one text, the second time finds everything and only reads
the text to see that it is the same. A trained tokenizer is kept together with what it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import DataError
from deepseek.core.events import Event
from deepseek.core.model_folder import GENERATION_FILE
from deepseek.core.storage import new_folder
from deepseek.data.batching import warn_of_losses
from deepseek.data.config import DataConfig
from deepseek.data.documents import Document
from deepseek.data.sources import Corpus, name_some
from deepseek.data.token_cache import TokenCache, build_token_cache, digest_documents, load_token_cache
from deepseek.data.tokenizing import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    TokenizerKind,
    load_tokenizer,
    save_tokenizer,
    train_encoder_tokenizer,
    train_tokenizer,
)

TOKENIZER_FOLDER, TRAIN_FOLDER, HELDOUT_FOLDER = "tokenizer", "train", "heldout"
_ORIGIN_FILE = "trained_on.json"


@dataclass(frozen=True)
class TokenizerReady(Event):
    """The tokenizer is there; tokenizing follows."""

    vocab_size: int
    is_reused: bool


@dataclass(frozen=True, eq=False)
class PreparedData:
    """The tokenizer and token caches that a training run reads."""

    tokenizer: Tokenizer
    train: TokenCache
    heldout: TokenCache | None
    """`None` where nothing is held out."""


def prepare_data(config: DataConfig, folder: Path) -> Iterator[Event]:
    """Fill `folder`; events are `TokenizerReady`, then `TokenizingProgress` and `CacheReady` for each part.

    The held-out part comes first: it is small, and where it turns out empty no hours were spent before that is said.
    """
    train, heldout = open_corpora(config)
    tokenizer, is_reused = provide_tokenizer(config, train, folder / TOKENIZER_FOLDER)
    yield TokenizerReady(tokenizer.vocab_size, is_reused)
    held_out: set[bytes] = set()
    trained_on: dict[str, None] = {}

    def compare(document: Document) -> None:
        if _digest(document) in held_out:
            trained_on[document.name] = None

    if heldout is not None:
        watched = _Watched(heldout, lambda document: held_out.add(_digest(document)))
        yield from build_token_cache(watched, tokenizer, folder / HELDOUT_FOLDER, total_bytes=heldout.num_bytes())
    watched = _Watched(train, compare)
    yield from build_token_cache(watched, tokenizer, folder / TRAIN_FOLDER, total_bytes=train.num_bytes())
    if config.batching == "packed_documents":
        warn_of_losses(load_token_cache(folder / TRAIN_FOLDER, is_verified=True), config)
    if trained_on and config.heldout_sources != config.sources:
        warn_caller(
            f"of the documents trained on, {len(trained_on)} are held out under another name, so that the held-out "
            f"loss is too good: {name_some(list(trained_on))}; take the copies away"
        )


def load_data(config: DataConfig, folder: Path, *, is_verified: bool = False) -> PreparedData:
    """Load the data that `prepare_data` made in `folder`; `is_verified` skips checksums, for just after it ran."""
    heldout = load_token_cache(folder / HELDOUT_FOLDER, is_verified=is_verified) if config.has_heldout else None
    return PreparedData(
        tokenizer=load_tokenizer(folder / TOKENIZER_FOLDER),
        train=load_token_cache(folder / TRAIN_FOLDER, is_verified=is_verified),
        heldout=heldout,
    )


def open_corpora(config: DataConfig) -> tuple[Corpus, Corpus | None]:
    """Open the training text and the held-out text of `config`; a file of both is held out, and a warning says so.

    Where both are the same sources, they are the same text: what is measured is how well it was learned by heart.
    """
    corpus = Corpus(config.sources, config.text_field, config.document_separator)
    if config.heldout_sources == config.sources:
        return corpus, corpus
    if config.heldout_sources:
        heldout = Corpus(config.heldout_sources, config.text_field, config.document_separator)
        return _exclude_files(corpus, heldout), heldout
    if not config.has_heldout:
        return corpus, None
    return corpus.split(config.heldout_fraction)


def _exclude_files(corpus: Corpus, heldout: Corpus) -> Corpus:
    """`corpus` without the files of `heldout`."""
    held_out = {file.identity for file in heldout.list_files()}
    shared = {file.identity: file.path for file in corpus.list_files() if file.identity in held_out}
    if not shared:
        return corpus
    warn_caller(f"held out by data.heldout_sources and so not trained on: {name_some(sorted(shared.values()))}")
    return replace(corpus, excluded=frozenset(shared))


@dataclass(frozen=True, eq=False)
class _Texts:
    """The texts of documents, to be read as often as needed."""

    documents: Iterable[Document]

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.documents)


@dataclass(frozen=True, eq=False)
class _Watched:
    """A corpus whose documents are shown to `watch` as they are read."""

    corpus: Corpus
    watch: Callable[[Document], object]

    def __iter__(self) -> Iterator[Document]:
        for document in self.corpus:
            self.watch(document)
            yield document


def _digest(document: Document) -> bytes:
    return hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class TokenizerSettings(Protocol):
    """Which tokenizer data have."""

    @property
    def tokenizer(self) -> str | None:
        """A `tokenizer.json` or a folder that holds one; `None` has one trained."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the one that is trained."""

    @property
    def tokenizer_kind(self) -> TokenizerKind:
        """Kind of the one that is trained."""


def provide_tokenizer(config: TokenizerSettings, documents: Iterable[Document], folder: Path) -> tuple[Tokenizer, bool]:
    """Return the tokenizer that `config` names or wants trained, kept in `folder`, and whether it was there already."""
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        keep(tokenizer, folder, origin={})
        return tokenizer, True
    kind = config.tokenizer_kind
    origin = {"documents_digest": digest_documents(documents), "vocab_size": config.vocab_size}
    if kind != "bpe":  # which is what folders without an entry hold
        origin["kind"] = kind
    if kept := _find_kept(folder, origin):
        return kept, True
    texts = _Texts(documents)
    if kind == "bpe":
        tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    else:
        tokenizer = train_encoder_tokenizer(texts, vocab_size=config.vocab_size, kind=kind)
    keep(tokenizer, folder, origin)
    return tokenizer, False


def keep(tokenizer: Tokenizer, folder: Path, origin: dict[str, Any]) -> None:
    """Put the tokenizer in place of the one kept before; refuses a folder that holds anything else."""
    kept = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if foreign := kept - {TOKENIZER_FILE, SETTINGS_FILE, GENERATION_FILE, _ORIGIN_FILE}:
        raise DataError(f"{folder} holds {min(foreign)!r}, which is not ours to replace; choose another data folder")
    with new_folder(folder) as temporary:
        save_tokenizer(tokenizer, temporary)
        content = json.dumps(origin | {"tokenizer_digest": tokenizer.digest}, indent=2)
        (temporary / _ORIGIN_FILE).write_text(content, encoding="utf-8")


def _find_kept(folder: Path, origin: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer kept in `folder`, if it was trained from `origin` and is still what it was."""
    if not folder.exists():
        return None
    try:
        kept_origin = json.loads((folder / _ORIGIN_FILE).read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, DataError) as error:
        warnings.warn(f"the tokenizer kept in {folder} is damaged and is trained again: {error}", stacklevel=3)
        return None
    if kept_origin.pop("tokenizer_digest", None) != tokenizer.digest:
        warnings.warn(f"{folder} does not hold the tokenizer that was trained; it is trained again", stacklevel=3)
        return None
    return tokenizer if kept_origin == origin else None
