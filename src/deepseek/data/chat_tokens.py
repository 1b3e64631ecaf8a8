"""From chats to tokens, and which of them are learned: what the assistant says, with the end of its turn.

    encoder = ChatEncoder(tokenizer, train_on="assistant")
    for pieces in encoder.encode(documents): ...           # ids and `learned`, for the token cache

    chat -> template -> text, characters of the answers -> tokens, those that touch an answer are learned

A template that marks what the assistant says (`{% generation %}`) is asked once for each chat, and the tokens are those
of `transformers.apply_chat_template(..., return_assistant_tokens_mask=True)`. Other templates are asked for beginnings
of the chat: an answer is what comes after the messages before it with the prompt for an answer, and it ends where the
messages up to it end. Both must begin the whole chat to the letter; a template that writes earlier messages in another
way once others follow (some leave out what was thought) is refused by name, since its answers cannot be found like
this. Line ends that a template writes behind the token that ends a turn belong to no answer.

Cost: a call of the template takes 0.1 to 0.2 ms; two for each answer where there are no marks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deepseek.core.errors import DataError, RequestError
from deepseek.data.chat_templates import CHATML, WrittenChat, write_chat
from deepseek.data.chats import Chat, read_document
from deepseek.data.documents import Document
from deepseek.data.samples import MAX_BROKEN, BrokenSampleError
from deepseek.data.token_cache import EncodedPiece
from deepseek.data.tokenizing import Tokenizer

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell half a surrogate pair, which no tokenizer takes
_ENCODED_TOGETHER = 64
Span = tuple[int, int]


@dataclass(eq=False)
class ChatEncoder:
    """Writes chats with a tokenizer's template, and counts those that are left out."""

    tokenizer: Tokenizer
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that are learned: all answers, the last one, or everything."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the template is told beside the messages and tools."""
    max_broken: int = MAX_BROKEN
    """Chats that may be left out because the template refuses them."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the chats left out."""
    num_without_answer: int = 0
    """Chats that are left out since nothing of them is learned."""

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides how a chat becomes tokens."""
        settings = [self.tokenizer.digest, self.template, self.train_on, dict(self.variables)]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def template(self) -> str:
        """The Jinja source."""
        return self.tokenizer.chat_template or CHATML

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each kind of chats that were left out."""
        notes = []
        if self.problems:
            some = "; ".join(self.problems[:3]) + f" and {len(self.problems) - 3} more" * (len(self.problems) > 3)
            notes.append(f"left out: {some}")
        if self.num_without_answer:
            notes.append(f"{self.num_without_answer} chats have no answer to learn and are left out")
        return tuple(notes)

    def encode(self, documents: Iterable[Document]) -> Iterator[list[EncodedPiece]]:
        """Return the chats among `documents` (see `Chat.to_document`) as tokens, some at a time.

        Raises `DataError` where the template is broken, more than `max_broken` are refused by it, or none is left.
        """
        num_encoded = 0
        written: list[tuple[str, list[Span] | None]] = []
        for document in documents:
            try:
                written.append(self.write(read_document(document)))
            except BrokenSampleError as error:
                self.problems.append(str(error))
                if len(self.problems) > self.max_broken:
                    raise DataError(
                        f"{len(self.problems)} chats cannot be written and {self.max_broken} may be left out; the "
                        f"first one: {self.problems[0]}"
                    ) from error
            if len(written) == _ENCODED_TOGETHER:
                pieces = self._tokenize(written)
                num_encoded, written = num_encoded + len(pieces), []
                yield pieces
        pieces = self._tokenize(written)
        if num_encoded + len(pieces) == 0:
            raise DataError(
                f"there is no chat to learn from: {'; '.join(self.notes)}; give chats with messages of the role "
                "assistant"
            )
        yield pieces

    def write(self, chat: Chat) -> tuple[str, list[Span] | None]:
        """Return a chat as text, and between which characters it is learned; `None` is all of them.

        Raises `BrokenSampleError` where the template refuses it or does not let the answers be found.
        """
        try:
            whole = self._write(chat, len(chat.messages))
            spans = None if self.train_on == "all" else self._find_answers(chat, whole)
        except RequestError as error:
            raise BrokenSampleError(f"{chat.name}: {error}") from error
        return _HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", whole.text), spans

    def _find_answers(self, chat: Chat, whole: WrittenChat) -> list[Span]:
        answers = chat.answers[-1:] if self.train_on == "last" else chat.answers
        num_said = sum(message["role"] == "assistant" for message in chat.messages)
        if not self._has_marks:
            return [self._find_by_beginnings(chat, index, whole.text) for index in answers]
        if len(answers) == num_said:
            return list(whole.generated)
        spans: list[Span] = []
        for index in answers:
            first, last = (len(self._write(chat, end).generated) if end else 0 for end in (index, index + 1))
            spans += whole.generated[first:last]
        return spans

    def _find_by_beginnings(self, chat: Chat, index: int, whole: str) -> Span:
        before = self._write(chat, index, add_generation_prompt=True).text
        after = self._write(chat, index + 1).text
        if not (whole.startswith(after) and after.startswith(before)):
            raise BrokenSampleError(
                f"{chat.name}: the chat template writes what is before or in message {index} in another way when the "
                "rest follows, so that this answer cannot be found in the text; put {% generation %} and "
                "{% endgeneration %} around answers in the template, or set data.train_on to last or all"
            )
        return len(before), len(after)

    def _write(self, chat: Chat, end: int, *, add_generation_prompt: bool = False) -> WrittenChat:
        """Write the first `end` messages."""
        messages = [{key: value for key, value in m.items() if key != "weight"} for m in chat.messages[:end]]
        return write_chat(
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=chat.tools,
            variables=self.variables,
        )

    def _tokenize(self, written: list[tuple[str, list[Span] | None]]) -> list[EncodedPiece]:
        encodings = self.tokenizer.backend.encode_batch([text for text, _ in written], add_special_tokens=False)
        pieces = []
        for (text, spans), encoding in zip(written, encodings, strict=True):
            offsets = np.asarray(encoding.offsets).reshape(-1, 2)
            learned = np.ones(len(encoding.ids), dtype=bool)
            if spans is not None:
                learned = find_learned(offsets, spans)
                if not self._has_marks:
                    is_special = np.isin(encoding.ids, self._special_ids)
                    learned &= ~find_learned(offsets, find_line_ends(text, offsets[is_special], spans))
            if learned[1:].any():  # the first token has nothing before it that it could be predicted from
                pieces.append(EncodedPiece(encoding.ids, is_last=True, learned=learned))
            else:
                self.num_without_answer += 1
        return pieces

    @cached_property
    def _special_ids(self) -> list[int]:
        return [number for number, token in self.tokenizer.backend.get_added_tokens_decoder().items() if token.special]

    @cached_property
    def _has_marks(self) -> bool:
        return _MARK.search(self.template) is not None


def find_line_ends(text: str, specials: NDArray[np.int64], spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the white space at the end of `spans` that stands behind one of `specials`, the (S, 2) special tokens."""
    for begin, end in spans:
        inside = specials[(specials[:, 0] >= begin) & (specials[:, 1] <= end)]
        if len(inside) and text[inside[-1, 1] : end].isspace():
            yield int(inside[-1, 1]), end


def find_learned(offsets: NDArray[np.int64], spans: Iterable[Span]) -> NDArray[np.bool_]:
    """Return of each token whether it has a character of `spans`; `offsets` are (T, 2), the characters of each.

    >>> find_learned(np.array([[0, 4], [4, 6], [6, 7]]), [(6, 7)]).tolist()
    [False, False, True]
    """
    learned = np.zeros(len(offsets), dtype=bool)
    for begin, end in spans:
        learned |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    return learned
