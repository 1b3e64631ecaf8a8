"""Turning tokens into text as they arrive: never half a character, never a part of a stop string.

A token may end inside a UTF-8 character, and a stop string may span several tokens. A `TextWriter` keeps back what may
still become either and lets go of the rest at once. Called by the engine, one writer for each sequence.

    tokens -> TextDecoder (whole characters) -> stop strings -> text to send, and the tokens whose text it is
"""

from __future__ import annotations

from typing import Protocol

from deepseek.serve.sequences import Logprobs, Token


class TextDecoder(Protocol):
    """An incremental decoder of one sequence."""

    def push(self, token_id: int) -> str:
        """Return the text that is complete with this token; may be empty."""

    def finish(self) -> str:
        """Return the text that is left at the end, incomplete characters replaced."""


class TextWriter:
    """The text of one sequence, released piece by piece; `is_stopped` once a stop string came."""

    def __init__(self, decoder: TextDecoder, stop: tuple[str, ...]) -> None:
        self.is_stopped = False
        self._decoder = decoder
        self._stop = stop
        self._text = ""  # decoded and not sent
        self._num_sent = 0  # characters
        self._tokens: list[Token] = []  # not sent

    def push(self, token_id: int, logprobs: Logprobs | None = None) -> tuple[str, tuple[Token, ...]]:
        """Add a token and return the text and the tokens that can be sent now."""
        self._tokens.append(Token(token_id, self._num_sent + len(self._text), logprobs))
        self._text += self._decoder.push(token_id)
        return self._release(num_kept=num_open(self._text, self._stop))

    def finish(self) -> tuple[str, tuple[Token, ...]]:
        """End the sequence without a stop string and return everything that was kept back."""
        self._text += self._decoder.finish()
        text, tokens = self._release(num_kept=0)
        rest = () if self.is_stopped else tuple(self._tokens)  # tokens without text of their own
        return text, tokens + rest

    def _release(self, num_kept: int) -> tuple[str, tuple[Token, ...]]:
        end = find_stop(self._text, self._stop)
        if end is None:
            end = len(self._text) - num_kept
        else:
            self.is_stopped = True
        text, self._text = self._text[:end], "" if self.is_stopped else self._text[end:]
        self._num_sent += len(text)
        num_tokens = sum(token.offset < self._num_sent for token in self._tokens)
        tokens, self._tokens = tuple(self._tokens[:num_tokens]), self._tokens[num_tokens:]
        return text, tokens


def find_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Return where to cut `text`: the start of the stop string that is complete first, of the longest if several are.

    >>> find_stop("one, two. three", (". ", ","))
    3
    """
    found = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
    return min(found)[1] if found else None


def num_open(text: str, stop: tuple[str, ...]) -> int:
    r"""Count the characters at the end of `text` that may be the beginning of a stop string.

    >>> num_open("def f():\n", ("\n\n", "class"))
    1
    """
    longest = max(map(len, stop), default=1) - 1
    return next((size for size in range(min(longest, len(text)), 0, -1) if _may_begin(text[-size:], stop)), 0)


def _may_begin(ending: str, stop: tuple[str, ...]) -> bool:
    return any(string.startswith(ending) for string in stop)
