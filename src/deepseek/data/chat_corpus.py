"""From a `ChatConfig` to a tokenizer and two token caches: everything a run on chats needs.

    for event in prepare_chats(config, folder):
        show(event)
    data = load_chats(config, folder)        # data.tokenizer, data.train, data.heldout

    rows of tables -> chats -> training part, held-out part -> token caches, with the tokens that are learned

The counterpart of `corpus.py`, which does this for text. The tokenizer that comes out has the template that the chats
were written with, and ends answers where they end: the token that closes the assistant's turns is one of its end
tokens, so that a server of the finished model knows when to stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError, DataError
from deepseek.core.events import Event
from deepseek.data.batching import warn_of_losses
from deepseek.data.chat_templates import CHATML, check_template
from deepseek.data.chat_tokens import ChatEncoder
from deepseek.data.chats import COLUMNS, parse_chat
from deepseek.data.config import ChatConfig
from deepseek.data.corpus import HELDOUT_FOLDER, TOKENIZER_FOLDER, TRAIN_FOLDER, PreparedData, TokenizerReady, keep
from deepseek.data.table_rows import TableRow, leave_out_broken, read_split
from deepseek.data.token_cache import TokenCache, build_token_cache, load_token_cache
from deepseek.data.tokenizing import Tokenizer, load_tokenizer

_CHATML_NAME = "chatml"


def prepare_chats(config: ChatConfig, folder: Path) -> Iterator[Event]:
    """Fill `folder`; events are those of `corpus.prepare_data`."""
    tokenizer = open_tokenizer(config)
    keep(tokenizer, folder / TOKENIZER_FOLDER, origin={})
    yield TokenizerReady(tokenizer.vocab_size, is_reused=True)
    train, heldout = read_split(config, COLUMNS)
    if heldout is not None:
        yield from _build_cache(config, heldout, tokenizer, folder / HELDOUT_FOLDER)
    yield from _build_cache(config, train, tokenizer, folder / TRAIN_FOLDER)
    warn_of_losses(load_token_cache(folder / TRAIN_FOLDER, is_verified=True), config)


def load_chats(config: ChatConfig, folder: Path, *, is_verified: bool = False) -> PreparedData:
    """Load what `prepare_chats` made in `folder`; `is_verified` skips checksums, for just after it ran."""
    train = load_token_cache(folder / TRAIN_FOLDER, is_verified=is_verified)
    heldout = load_token_cache(folder / HELDOUT_FOLDER, is_verified=is_verified) if config.has_heldout else None
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    return PreparedData(end_where_answers_do(tokenizer, train, config), train, heldout)


def open_tokenizer(config: ChatConfig) -> Tokenizer:
    """Open the tokenizer of `config` with the template that chats are written by.

    Raises `ConfigError` where one of them is missing, and `DataError` for a template that is broken.
    """
    if config.tokenizer is None:
        raise ConfigError(
            "chats need the tokenizer of a model, and data.tokenizer is not given; give one, or the model as init"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    if config.chat_template is not None:
        tokenizer = replace(tokenizer, chat_template=_read_template(config.chat_template))
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer {config.tokenizer} has no chat template; set data.chat_template=chatml, or to a file with "
            "one"
        )
    check_template(tokenizer)
    return tokenizer


def end_where_answers_do(tokenizer: Tokenizer, chats: TokenCache, config: ChatConfig) -> Tokenizer:
    """Return `tokenizer` with the token that ends most answers of `chats` as one of its end tokens.

    Warns where answers end with plain text, after which no server stops.
    """
    if config.train_on == "all":
        return tokenizer
    assert chats.learned is not None
    is_last = np.append(chats.learned[:-1] & ~chats.learned[1:], chats.learned[-1])
    numbers, counts = np.unique(chats.tokens[is_last], return_counts=True)
    number = int(numbers[counts.argmax()])
    token = tokenizer.backend.get_added_tokens_decoder().get(number)
    if token is None or not token.special:
        warn_caller(
            "the chat template ends answers with no special token of the tokenizer, so that a server of the model will "
            "not know where they end; choose a template with a token of this tokenizer at the end of a turn"
        )
        return tokenizer
    if number in tokenizer.end_ids:
        return tokenizer
    return replace(tokenizer, other_end_ids=(*tokenizer.other_end_ids, number))


def _read_template(name: str) -> str:
    if name == _CHATML_NAME:
        return CHATML
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={name} cannot be read ({error}); give a Jinja file, or chatml") from error


def _build_cache(config: ChatConfig, rows: list[TableRow], tokenizer: Tokenizer, folder: Path) -> Iterator[Event]:
    chats = leave_out_broken(rows, parse_chat, max_broken=config.max_broken)
    documents = [chat.to_document() for chat in chats]
    encoder = ChatEncoder(
        tokenizer, train_on=config.train_on, variables=config.template_variables, max_broken=config.max_broken
    )
    total_bytes = sum(len(document.text.encode()) for document in documents)
    yield from build_token_cache(documents, encoder, folder, total_bytes=total_bytes)
