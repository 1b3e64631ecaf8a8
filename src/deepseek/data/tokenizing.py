"""Text to token numbers and back: training a byte-level BPE, loading any `tokenizer.json`, decoding a stream.

Called by the data preparation, which trains or loads a tokenizer, and by servers, which decode token by token. All
the work is done by the library `tokenizers`; what is added here is the little that a model folder says about its
tokenizer beside `tokenizer.json`: which tokens end a text, which begins one, and how a chat is written. Truncation and
padding saved in a `tokenizer.json` are how somebody last called it, no rule of the model; they are switched off.

Byte-level BPE (Sennrich et al. 2016, "Neural machine translation of rare words with subword units"; on bytes in
Radford et al. 2019, GPT-2) knows every text: what it has no token for is spelled in bytes. Training gives the same
tokenizer every time, with any number of threads.

Special tokens written out in a text are read as these tokens, as in `transformers`; a corpus that separates its
stories with `<|endoftext|>` is therefore separated.

Cost, on two cores: training 4,096 tokens on 10 MB takes 1.4 s, encoding them 1.7 s.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from deepseek.artifact.reading import is_artifact, read_manifest
from deepseek.core.errors import ConfigError, DataError
from deepseek.core.model_folder import GENERATION_FILE, TOKENIZER_SETTINGS_FILE, ModelFolder, read_text
from deepseek.core.storage import write_file

END_OF_TEXT = "<|endoftext|>"
ENCODER_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""Special tokens of the tokenizers that are trained for encoders, numbered from 0 in this order, as BERT's are."""
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = TOKENIZER_SETTINGS_FILE
TEMPLATE_FILE = "chat_template.jinja"

EncoderKind = Literal["wordpiece", "encoder_bpe"]
TokenizerKind = Literal["bpe", EncoderKind]
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_MAX_TOKENIZER_BYTES = 512 << 20  # the largest vocabularies in use take about 40 MB
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# How tokenizers were saved before there was tokenizer.json.
_SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt")
# Asked in this order of a tokenizer.json that lies alone, without the settings that would name its end token.
_USUAL_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "<|im_end|>", "</s>", "[SEP]")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with what its model folder says about it; made by `train_tokenizer` or `load_tokenizer`."""

    backend: tokenizers.Tokenizer
    eos_token: str
    bos_token: str | None = None
    chat_template: str | None = None
    """Jinja source; `None` means ChatML, see `chat_templates`."""
    other_end_ids: tuple[int, ...] = ()
    """Tokens besides `eos_token` that end an answer, as chat models have them."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Other special tokens by name (`pad_token`, ...), which chat templates may ask for."""

    @cached_property
    def vocab_size(self) -> int:
        """All token numbers are below it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def num_learned(self) -> int:
        """All token numbers that text can become are below it: without tokens that were added at the end."""
        added = self.backend.get_added_tokens_decoder()
        return max((number for number in self.backend.get_vocab().values() if number not in added), default=-1) + 1

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return self._id_of(self.eos_token)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end an answer."""
        return frozenset((self.eos_id, *self.other_end_ids))

    @property
    def bos_id(self) -> int | None:
        """The token that begins a document, where the model has one."""
        return None if self.bos_token is None else self._id_of(self.bos_token)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that decides how a document becomes tokens."""
        return hashlib.sha256((self.backend.to_str() + self.eos_token).encode()).hexdigest()

    def encode(self, text: str, *, max_len: int | None = None, add_special_tokens: bool = False) -> list[int]:
        """Encode `text`, at most `max_len` tokens; `add_special_tokens` as the tokenizer's own rules say.

        >>> tokenizer = train_tokenizer(["ab ab ab"], vocab_size=259)
        >>> tokenizer.decode(tokenizer.encode("ab é"))
        'ab é'
        """
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids[:max_len])

    def encode_batch(self, texts: Sequence[str], *, max_len: int | None = None) -> list[list[int]]:
        """Encode many texts at once, on all cores, without special tokens."""
        return [encoded.ids[:max_len] for encoded in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode token numbers to text; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def find_special(self, texts: Iterable[str]) -> list[int]:
        """Return the numbers of those `texts` that are special tokens, which decoding leaves out of a text."""
        added = self.backend.get_added_tokens_decoder()
        numbers = {token.content: number for number, token in added.items() if token.special}
        return [numbers[text] for text in texts if text in numbers]

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token adds to a text, in bytes: it may be a part of a character, and keeps its space.

        >>> tokenizer = train_tokenizer([], vocab_size=257)
        >>> [tokenizer.token_bytes(token) for token in tokenizer.encode(" é")]
        [b' ', b'\xc3', b'\xa9']
        """
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added_ids:
            return piece.encode()
        if "ByteFallback" in self._decoder_kinds and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        if "ByteLevel" in self._decoder_kinds:
            values = [_byte_values().get(character) for character in piece]
            return bytes(value for value in values if value is not None) if None not in values else piece.encode()
        before = self._plain_ids
        sent, both = self.decode(before), self.decode([*before, token_id])
        return (both.removeprefix(sent) if both.startswith(sent) else self.decode([token_id])).encode()

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def _plain_ids(self) -> list[int]:
        """One token of plain letters, if there is one: after it, decoders write the space that a token begins with."""
        plain = (
            number
            for piece, number in self.backend.get_vocab().items()
            if piece.isascii() and piece.isalpha() and number not in self._added_ids
        )
        return [number] if (number := min(plain, default=None)) is not None else []

    @cached_property
    def _decoder_kinds(self) -> frozenset[str]:
        state = json.loads(self.backend.to_str())["decoder"] or {}
        return frozenset(decoder["type"] for decoder in (state, *state.get("decoders", ())) if "type" in decoder)

    def _id_of(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise DataError(f"the tokenizer has no token {token!r}; name one of its own as eos_token or bos_token")
        return number


class StreamDecoder:
    """Text of tokens as they come, never half a character.

    What `push` and `finish` return, joined, is what `decode` of all the tokens returns, unless a later token changes
    the text of earlier ones: some tokenizers write three broken characters for two bytes that were one whole character
    when a third, broken byte follows. What was sent stays then, and the rest is decoded by itself. `prompt_ids` are the
    tokens before the first one pushed; tokenizers that write a space in front of words need them to know whether one is
    due. They must end with a whole character.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._sent = list(prompt_ids)  # the last tokens whose text is out; what follows may depend on them
        self._unsent: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty while a character is still missing bytes."""
        self._unsent.append(token_id)
        piece = self._unsent_text()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._sent, self._unsent = self._unsent, []
        return piece

    def finish(self) -> str:
        """Return what was held back; an unfinished character comes out as U+FFFD."""
        rest = self._unsent_text()
        self._sent, self._unsent = self._unsent or self._sent, []
        return rest

    def _unsent_text(self) -> str:
        sent, both = self._text(self._sent), self._text([*self._sent, *self._unsent])
        return both.removeprefix(sent) if both.startswith(sent) else self._text(self._unsent)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
) -> Tokenizer:
    """Train a byte-level BPE with `vocab_size` tokens; the first special token is number 0 and ends documents.

    Raises `ConfigError` where the 256 bytes and the special tokens do not fit in, and warns when `texts` are too few
    to find so many tokens.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(special_tokens)
    if not special_tokens:
        raise ConfigError(
            f"special_tokens is empty; give at least one, which ends documents, for example {END_OF_TEXT}"
        )
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size={vocab_size} is below {smallest}, the bytes and special tokens; raise it")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if (found := backend.get_vocab_size()) < vocab_size:
        warnings.warn(
            f"the texts yield {found} tokens, not vocab_size={vocab_size}; more text finds more", stacklevel=2
        )
    return Tokenizer(backend, eos_token=special_tokens[0])


def train_encoder_tokenizer(texts: Iterable[str], *, vocab_size: int, kind: EncoderKind = "wordpiece") -> Tokenizer:
    """Train a tokenizer with BERT's special tokens, which puts `[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]`.

    `wordpiece` is BERT's (Devlin et al. 2018): lower case, without accents, words cut into pieces that `##` continues.
    `encoder_bpe` is the byte-level BPE of `train_tokenizer`, which loses nothing of a text. Raises `ConfigError` where
    `vocab_size` has no room for the special tokens and the letters, and warns when `texts` are too few for it.

    >>> tokenizer = train_encoder_tokenizer(["walk walking walked"] * 9, vocab_size=27)
    >>> [tokenizer.backend.id_to_token(number) for number in tokenizer.encode("Walked", add_special_tokens=True)]
    ['[CLS]', 'walk', '##ed', '[SEP]']
    """
    names = list(ENCODER_TOKENS.values())
    if kind == "encoder_bpe":
        backend = train_tokenizer(texts, vocab_size=vocab_size, special_tokens=names).backend
    else:
        if vocab_size <= len(names):
            raise ConfigError(f"vocab_size={vocab_size} has no room beside {len(names)} special tokens; raise it")
        backend = _train_wordpiece(texts, vocab_size, names)
        if (found := backend.get_vocab_size()) < vocab_size:
            warnings.warn(
                f"the texts yield {found} tokens, not vocab_size={vocab_size}; more text finds more", stacklevel=2
            )
    begin, end = ENCODER_TOKENS["cls_token"], ENCODER_TOKENS["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, names.index(token)) for token in (begin, end)],
    )
    return Tokenizer(backend, eos_token=end, bos_token=begin, special_tokens=ENCODER_TOKENS)


def _train_wordpiece(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> tokenizers.Tokenizer:
    """Train BERT's WordPiece, the same every time.

    The library numbers the letters that continue a word in the order of a hash table, another in every run, and among
    pairs that are equally frequent the numbers decide. So it is asked twice: for the letters alone, and, with these in
    a fixed order as if they were special tokens, for the pieces.
    """
    again = texts if not isinstance(texts, Iterator) else list(texts)
    letters = _wordpiece_vocabulary(again, 0, special_tokens).keys() - set(special_tokens)
    fixed = [*special_tokens, *sorted(letters)]
    model = models.WordPiece(_wordpiece_vocabulary(again, vocab_size, fixed), unk_token=ENCODER_TOKENS["unk_token"])
    backend = _wordpiece_backend(model)
    backend.add_special_tokens(special_tokens)
    return backend


def _wordpiece_vocabulary(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> dict[str, int]:
    backend = _wordpiece_backend(models.WordPiece(unk_token=ENCODER_TOKENS["unk_token"]))
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend.get_vocab()


def _wordpiece_backend(model: models.WordPiece) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, or a model folder with one and its settings; raises `DataError` if that fails."""
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    folder = ModelFolder(file.parent, listed=read_manifest(file.parent).files if is_artifact(file.parent) else None)
    if not file.is_file() or folder.find(file.name) is None:
        parts = [name for name in _SLOW_FILES if (file.parent / name).is_file()]
        way_out = "give a tokenizer.json or a folder that holds one"
        if parts:
            way_out = (
                f"the folder holds {', '.join(parts)}: `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` "
                f"of transformers makes a {TOKENIZER_FILE} of it"
            )
        raise DataError(f"there is no tokenizer at {file}; {way_out}")
    backend = read_tokenizer_file(file, folder)
    eos_token = _find_end_token(backend, folder, file)
    end_ids = (number for number in folder.end_ids if number != backend.token_to_id(eos_token))
    known = {name: token for name, token in folder.special_tokens.items() if backend.token_to_id(token) is not None}
    return Tokenizer(
        backend,
        eos_token=eos_token,
        bos_token=_find_named_token(backend, folder, "bos_token", file),
        chat_template=_read_chat_template(folder),
        other_end_ids=tuple(number for number in end_ids if backend.id_to_token(number) is not None),
        special_tokens={name: token for name, token in known.items() if name not in ("eos_token", "bos_token")},
    )


def read_tokenizer_file(file: Path, folder: ModelFolder | None = None) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json` as the library `tokenizers` has it, with the tokens that its `folder` adds.

    Truncation and padding that were saved in it are what its last user did, not a rule of the model, and are left out.
    """
    if (size := file.stat().st_size) > _MAX_TOKENIZER_BYTES:
        raise DataError(f"{file} has {size} bytes, and a tokenizer has at most {_MAX_TOKENIZER_BYTES}; copy it again")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file} cannot be read as a tokenizer ({error}); copy it again from where it came") from error
    backend.no_truncation()
    backend.no_padding()
    _add_tokens(backend, (folder or ModelFolder(file.parent)).tokenizer)
    return backend


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and its settings; `transformers.AutoTokenizer` reads the folder as well."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.eos_token,
        "bos_token": tokenizer.bos_token,
        "chat_template": tokenizer.chat_template,
    }
    known = {key: value for key, value in settings.items() if value is not None} | dict(tokenizer.special_tokens)
    write_file(folder / TOKENIZER_FILE, tokenizer.backend.to_str().encode())
    write_file(folder / SETTINGS_FILE, json.dumps(known, indent=2, ensure_ascii=False).encode())
    end_ids = [tokenizer.eos_id, *tokenizer.other_end_ids]
    generation = {"eos_token_id": end_ids if tokenizer.other_end_ids else tokenizer.eos_id}
    if tokenizer.bos_id is not None:
        generation["bos_token_id"] = tokenizer.bos_id
    write_file(folder / GENERATION_FILE, json.dumps(generation, indent=2).encode())


@cache
def _byte_values() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (Radford et al. 2019).

    Bytes that are printable stand for themselves; the others, in order, are the letters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _add_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the tokens that `tokenizer_config.json` lists and `tokenizer.json` lacks, as `transformers` does."""
    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, Mapping):
        return
    tokens = [token for _, token in sorted(listed.items(), key=lambda row: int(row[0]) if row[0].isdigit() else -1)]
    for token in tokens:
        content = token.get("content") if isinstance(token, Mapping) else None
        if isinstance(content, str) and backend.token_to_id(content) is None:
            options = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "special")}
            is_normalized = bool(token.get("normalized", not options["special"]))
            backend.add_tokens([AddedToken(content, normalized=is_normalized, **options)])


def _find_end_token(backend: tokenizers.Tokenizer, folder: ModelFolder, file: Path) -> str:
    """Return the token that ends a document: the named one, the first of the model's, or the usual one."""
    candidates = [
        _find_named_token(backend, folder, "eos_token", file),
        *(backend.id_to_token(number) for number in folder.end_ids),
        *(token for token in _USUAL_END_TOKENS if backend.token_to_id(token) is not None),
    ]
    token = next((token for token in candidates if token is not None), None)
    if token is None:
        raise DataError(f"{file} does not say which token ends a text; write eos_token into {SETTINGS_FILE} beside it")
    return token


def _find_named_token(backend: tokenizers.Tokenizer, folder: ModelFolder, name: str, file: Path) -> str | None:
    token = folder.special_tokens.get(name)
    if token is not None and backend.token_to_id(token) is None:
        raise DataError(f"{name} is {token!r} in {file.parent}, which {file} does not know; name one of its tokens")
    return token


def _read_chat_template(folder: ModelFolder) -> str | None:
    """Return the template beside the tokenizer; its own file wins, and of several in the settings the default."""
    if (file := folder.find(TEMPLATE_FILE)) is not None:
        return read_text(file)
    template = folder.tokenizer.get("chat_template")
    if isinstance(template, list):
        return next((named["template"] for named in template if named.get("name") == "default"), None)
    return template
