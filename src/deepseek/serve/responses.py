"""Answers of the OpenAI API as JSON values: whole ones, the chunks of streamed ones, and errors.

`CompletionAnswer` and `ChatAnswer` have the same methods, so that their endpoints differ only in the body they read.
Field names and shapes are those of https://platform.openai.com/docs/api-reference; the tests read them with OpenAI's
own client.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

from deepseek.serve.sequences import FinishReason, Generation, LiveSequence, Logprobs, Output, Token

Json: TypeAlias = dict[str, Any]

_ERROR_TYPES = {401: "authentication_error", 500: "server_error", 503: "overloaded_error"}


def error(message: str, *, status: int, param: str | None = None, code: str | None = None) -> Json:
    """Build the body of an error.

    >>> error("no", status=404)["error"]["type"]
    'invalid_request_error'
    """
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_card(name: str, created_s: int, max_length: int) -> Json:
    """Build an entry of `/v1/models`; `max_model_len` is vLLM's addition."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "deepseek", "max_model_len": max_length}


def usage(sequences: Iterable[LiveSequence]) -> Json:
    """Count the tokens of an answer; a prompt with several choices counts once."""
    requests = [(sequence.request, sequence.tokens) for sequence in sequences]
    num_prompt_tokens = sum(len(request.prompt) for request, _ in requests if request.choice == 0)
    num_generated = sum(len(tokens) for _, tokens in requests)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt_tokens + num_generated,
    }


@dataclass(frozen=True)
class Answer(ABC):
    """One answer in the making; `token_bytes` gives what a token id adds to a text."""

    model: str
    token_bytes: Callable[[int], bytes]
    created_s: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, generations: Sequence[Generation], counts: Json) -> Json:
        """Build the answer in one piece."""
        choices = [self._choice(index, generation) for index, generation in enumerate(generations)]
        return self._envelope(self.whole_object, choices) | {"usage": counts}

    @abstractmethod
    def opening(self, num_choices: int) -> list[Json]:
        """Build the chunks before the first token."""

    def chunk(self, index: int, output: Output) -> Json:
        """Build the chunk that `output` adds to the choice `index`."""
        return self._envelope(self.chunk_object, [self._delta(index, output.text, output.tokens, output.finish_reason)])

    def _text(self, token_id: int) -> str:
        """Write a token as text; one that is a part of a character as OpenAI writes it, `bytes:\\xc3`."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def closing(self, counts: Json) -> Json:
        """Build the chunk of token counts."""
        return self._envelope(self.chunk_object, []) | {"usage": counts}

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.id_prefix}-{self.key}",
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }

    @abstractmethod
    def _choice(self, index: int, generation: Generation) -> Json: ...

    @abstractmethod
    def _delta(self, index: int, text: str, tokens: Sequence[Token], finish_reason: FinishReason | None) -> Json: ...


@dataclass(frozen=True)
class CompletionAnswer(Answer):
    """`/v1/completions`; `echoes` are put before the choices, scored ones together with their tokens."""

    echoes: tuple[str, ...] = ()
    is_scored: bool = False
    """Whether log-probabilities of the prompt's tokens come with its echo."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, num_choices: int) -> list[Json]:
        if self.is_scored:
            return []
        deltas = [self._delta(index, echo, (), None) for index, echo in enumerate(self.echoes)]
        return [self._envelope(self.chunk_object, [delta]) for delta in deltas]

    def chunk(self, index: int, output: Output) -> Json:
        tokens, echo = self._shift(index, output.tokens), self.echoes[index] if output.prompt_tokens else ""
        delta = self._delta(index, echo + output.text, (*output.prompt_tokens, *tokens), output.finish_reason)
        return self._envelope(self.chunk_object, [delta])

    def _choice(self, index: int, generation: Generation) -> Json:
        echo = self.echoes[index] if self.echoes else ""
        tokens = (*generation.prompt_tokens, *self._shift(index, generation.tokens))
        return self._delta(index, echo + generation.text, tokens, generation.finish_reason)

    def _shift(self, index: int, tokens: Sequence[Token]) -> tuple[Token, ...]:
        """Count the offsets of generated tokens from the start of the echo, where there is one."""
        start = len(self.echoes[index]) if self.echoes else 0
        return tuple(replace(token, offset=start + token.offset) for token in tokens)

    def _delta(self, index: int, text: str, tokens: Sequence[Token], finish_reason: FinishReason | None) -> Json:
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not any(token.logprobs for token in tokens) and not (tokens and self.is_scored):
            return None
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprobs and token.logprobs.chosen for token in tokens],
            "top_logprobs": [token.logprobs and self._top(token.id, token.logprobs) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token_id: int, logprobs: Logprobs) -> dict[str, float]:
        """List the likeliest first, the chosen one among them; of several tokens with one text, the likeliest."""
        values: dict[str, float] = {}
        for candidate, value in (*logprobs.top, (token_id, logprobs.chosen)):
            values.setdefault(self._text(candidate), value)
        return values


@dataclass(frozen=True)
class ChatAnswer(Answer):
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, num_choices: int) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        choices = [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(num_choices)]
        return [self._envelope(self.chunk_object, [choice]) for choice in choices]

    def _choice(self, index: int, generation: Generation) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": generation.text, "refusal": None},
            "logprobs": self._logprobs(generation.tokens),
            "finish_reason": generation.finish_reason,
        }

    def _delta(self, index: int, text: str, tokens: Sequence[Token], finish_reason: FinishReason | None) -> Json:
        return {
            "index": index,
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        scored = [(token, token.logprobs) for token in tokens if token.logprobs is not None]
        if not scored:
            return None
        return {
            "content": [
                self._entry(token.id, logprobs.chosen) | {"top_logprobs": [self._entry(*pair) for pair in logprobs.top]}
                for token, logprobs in scored
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, logprob: float) -> Json:
        return {"token": self._text(token_id), "logprob": logprob, "bytes": list(self.token_bytes(token_id))}
