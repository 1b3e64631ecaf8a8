"""Masked language modeling: which tokens of a row are hidden, and by what, as BERT was trained (Devlin et al. 2018).

    vocabulary = read_vocabulary(tokenizer)
    inputs_T, targets_T = mask_tokens(tokens_T, vocabulary, MaskingRule(), random)

Each token is chosen with `share`; of the chosen ones 80 % become the mask token, 10 % a random token and 10 % stay as
they are. All of them are to be predicted, and none else. Special tokens are never chosen and never drawn. With
`whole_words`, words are chosen instead of tokens ("Whole Word Masking" of the second release of BERT), and each
token of a chosen word is replaced for itself. A row where nothing was chosen gives one token or word at random, so that
every row teaches something.

What belongs to one word is read from the tokenizer: pieces with the prefix of WordPiece (`##`) continue one; in other
vocabularies a piece continues the one before it where that ends and it begins with letters, digits or other signs
alike, without a space between them, as their pre-tokenizers cut. Shapes: T tokens of a row, V tokens of the vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepseek.core.errors import DataError
from deepseek.data.batching import IGNORED_TARGET, IntArray
from deepseek.data.tokenizing import Tokenizer

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the chosen tokens, those that become the mask token, and those that become a random one."""
_USUAL_MASK_TOKENS = ("[MASK]", "<mask>")
_SPACES = "Ġ▁"  # how byte-level BPE and SentencePiece write the space before a word
_SPACE, _LETTER, _DIGIT, _SIGN, _ALONE = range(5)

KindArray = NDArray[np.int8]


@dataclass(frozen=True)
class MaskingRule:
    """Which tokens are hidden."""

    share: float = 0.15
    """Share of the tokens, or of the words, that are to be predicted."""
    whole_words: bool = False
    """Choose words instead of tokens."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Facts about the tokens that masking asks for."""

    mask_id: int
    plain_ids: IntArray
    """Tokens that are not special, which random ones are drawn from."""
    is_special_V: NDArray[np.bool_]
    first_V: KindArray
    """Kind of what a token begins with: space, letter, digit, sign, or always alone."""
    last_V: KindArray
    """Kind of what it ends with."""


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Read what masking asks for; raises `DataError` for a tokenizer without a mask token."""
    backend = tokenizer.backend
    known = (tokenizer.special_tokens.get("mask_token"), *_USUAL_MASK_TOKENS)
    ids = [backend.token_to_id(token) for token in known if token is not None]
    mask_id = next((number for number in ids if number is not None), None)
    if mask_id is None:
        raise DataError(
            "the tokenizer has no mask token, which masked language modeling hides tokens with; give an encoder's, "
            "or train one with data.tokenizer_kind=wordpiece"
        )
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    special |= {number for token in tokenizer.special_tokens.values() if (number := backend.token_to_id(token))}
    pieces = [backend.id_to_token(number) for number in range(tokenizer.vocab_size)]
    is_special_V = np.array([piece is None or number in special for number, piece in enumerate(pieces)])
    is_special_V[mask_id] = True
    kinds = [_kinds_of(piece) for piece in _readable(tokenizer, pieces)]
    first_V, last_V = (np.array(side, dtype=np.int8) for side in zip(*kinds, strict=True))
    first_V[is_special_V] = last_V[is_special_V] = _ALONE
    return Vocabulary(mask_id, np.flatnonzero(~is_special_V), is_special_V, first_V, last_V)


def mask_tokens(
    tokens_T: IntArray, vocabulary: Vocabulary, rule: MaskingRule, random: np.random.Generator
) -> tuple[IntArray, IntArray]:
    """Return the tokens that the model sees and the (T,) targets, -100 where nothing is to be predicted."""
    is_chosen_T = choose_tokens(tokens_T, vocabulary, rule, random)
    fate_T = random.random(len(tokens_T))
    drawn_T = vocabulary.plain_ids[random.integers(len(vocabulary.plain_ids), size=len(tokens_T))]
    inputs_T = np.where(is_chosen_T & (fate_T < MASKED_SHARE), vocabulary.mask_id, tokens_T)
    is_random_T = is_chosen_T & (fate_T >= MASKED_SHARE) & (fate_T < MASKED_SHARE + RANDOM_SHARE)
    return np.where(is_random_T, drawn_T, inputs_T), np.where(is_chosen_T, tokens_T, IGNORED_TARGET)


def choose_tokens(
    tokens_T: IntArray, vocabulary: Vocabulary, rule: MaskingRule, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Return which tokens are to be predicted; at least one, unless all are special."""
    is_plain_T = ~vocabulary.is_special_V[tokens_T]
    words_T = number_words(tokens_T, vocabulary) if rule.whole_words else np.arange(len(tokens_T))
    is_chosen_W = random.random(len(tokens_T)) < rule.share
    candidates = np.flatnonzero(is_plain_T)
    spare = random.integers(max(1, len(candidates)))
    if len(candidates) and not (is_chosen_W[words_T] & is_plain_T).any():
        is_chosen_W[words_T[candidates[spare]]] = True
    return np.asarray(is_chosen_W[words_T] & is_plain_T)


def number_words(tokens_T: IntArray, vocabulary: Vocabulary) -> IntArray:
    """Return the number of the word that each token belongs to, from 0; a special token is one for itself."""
    first_T, last_T = vocabulary.first_V[tokens_T], vocabulary.last_V[tokens_T]
    is_start_T = np.ones(len(tokens_T), dtype=bool)
    is_gap_T = (first_T == _SPACE) & (last_T == _SPACE)
    begins_T = (first_T == _SPACE) & ~is_gap_T
    is_start_T[1:] = (first_T[1:] != last_T[:-1]) | begins_T[1:] | (first_T[1:] == _ALONE)
    return np.cumsum(is_start_T) - 1


def _readable(tokenizer: Tokenizer, pieces: list[str | None]) -> list[str]:
    """Return the pieces with a space before each that begins a word."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    if prefix := model.get("continuing_subword_prefix"):
        # One kind for all, so that only the space decides.
        return ["a" if piece is not None and piece.startswith(prefix) else " a" for piece in pieces]
    is_bytes = any(piece is not None and piece.startswith("Ġ") for piece in pieces)
    texts = (
        tokenizer.token_bytes(number).decode(errors="replace") if is_bytes else piece or ""
        for number, piece in enumerate(pieces)
    )
    return [text.translate(dict.fromkeys(map(ord, _SPACES), " ")) for text in texts]


def _kinds_of(piece: str) -> tuple[int, int]:
    return (_kind_of(piece[0]), _kind_of(piece[-1])) if piece else (_ALONE, _ALONE)


def _kind_of(character: str) -> int:
    if character.isspace():
        return _SPACE
    # Part of a character of several bytes, which is a letter in nearly all texts.
    if character.isalpha() or character == "\N{REPLACEMENT CHARACTER}":
        return _LETTER
    return _DIGIT if character.isnumeric() else _SIGN
