"""What is asked of the engine, and what becomes of it: the values that scheduling, sampling and the engine share.

A `GenerationRequest` is a prompt as token ids and how to continue it. A `LiveSequence` is that request on its way
through the engine; only the scheduler and the engine change it. An `Output` is what one step says about one sequence,
and a `Generation` is all of them together. No torch here.
"""

from __future__ import annotations

import enum
import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from deepseek.core.errors import RequestError

_ids = itertools.count()


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are the ones of the OpenAI API, and vLLM's word for a cancelled one."""

    STOP = "stop"
    """The end-of-text token or a stop string came."""
    LENGTH = "length"
    """`max_tokens` were generated."""
    CANCELLED = "abort"
    """Nobody waits for it any more."""
    ERROR = "error"
    """This sequence could not be continued; the others go on."""


@dataclass(frozen=True)
class Sampling:
    """Settings that choose the next token from the logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the most probable token."""
    top_k: int = 0
    """Only this many of the most probable tokens; 0 is all of them."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability."""
    seed: int | None = None
    """Requests with the same seed get the same random numbers; none gets new ones each time. An answer does not depend
    on what else is in its batch either: compared for float32 and int8 weights, token for token."""
    num_logprobs: int | None = None
    """Report each token's log-probability and those of this many alternatives; none reports nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise RequestError(f"temperature={self.temperature}; choose 0 or more", param="temperature")
        if not 0 <= self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p}; choose 0 to 1", param="top_p")
        if self.top_k < 0:
            raise RequestError(f"top_k={self.top_k}; choose 0 for all tokens, or more", param="top_k")

    @property
    def is_greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0


@dataclass(frozen=True)
class GenerationRequest:
    """One text to be continued."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    ignore_eos: bool = False
    """Go on to `max_tokens` past an end-of-text token, as benchmarks want it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text like a stop string, even where `ignore_eos` lets it go on."""
    prompt_logprobs: int | None = None
    """Report the log-probability of each prompt token and this many alternatives; none reports nothing."""
    choice: int = 0
    """Which of several answers to one prompt this is; with a seed, each has random numbers of its own."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt has no tokens; send at least one", param="prompt", code="empty_prompt")
        least = 1 if self.prompt_logprobs is None else 0  # scoring a prompt is something to do by itself
        if self.max_tokens < least:
            raise RequestError(f"max_tokens={self.max_tokens}; choose {least} or more", param="max_tokens")
        if "" in self.stop:
            raise RequestError("one of the stop strings is empty; leave it out", param="stop")


@dataclass(frozen=True)
class Logprobs:
    """Natural-log probabilities before temperature and filters: of the chosen token, and of the likeliest ones."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Token:
    """A token; `offset` is where its text begins, in characters from the start of the generated text or the prompt."""

    id: int
    offset: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Output:
    """The additions of one step to one sequence; the last one of a sequence has a `finish_reason`."""

    sequence_id: int
    request: GenerationRequest
    text: str = ""
    tokens: tuple[Token, ...] = ()
    """Tokens whose text is out; a token waits here while its text may be the start of a stop string."""
    num_generated: int = 0
    """Tokens generated so far, the end-of-text token included."""
    prompt_tokens: tuple[Token, ...] = ()
    """The prompt with its log-probabilities, in the first output of a request for them."""
    finish_reason: FinishReason | None = None
    error: RequestError | None = None
    """Why the sequence could not be continued, where `finish_reason` says that it could not."""
    is_first: bool = False
    """Whether this is the step that generated the first token."""
    queued_s: float = 0.0
    """From submission to the first work on the prompt."""
    elapsed_s: float = 0.0
    """From submission to now."""
    token_s: float | None = None
    """From the token before (or the submission) to this one; none where no token was generated."""


@dataclass(frozen=True)
class Generation:
    """A finished answer."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generated: int
    prompt_tokens: tuple[Token, ...] = ()


@dataclass(eq=False)
class LiveSequence:
    """A request on its way through the engine."""

    request: GenerationRequest
    id: int = field(default_factory=lambda: next(_ids))
    tokens: list[int] = field(default_factory=list)
    """The tokens generated so far."""
    num_read: int = 0
    """How much of the prompt is in the KV cache."""
    prompt_scores: list[Logprobs | None] = field(default_factory=lambda: [None])
    """Log-probabilities of the prompt tokens read so far; nothing comes before the first."""
    is_cancelled: bool = False
    finish_reason: FinishReason | None = None
    error: RequestError | None = None
    submitted_s: float = field(default_factory=time.perf_counter)
    started_s: float | None = None
    last_token_s: float | None = None
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        seed = self.request.sampling.seed
        self.random = random.Random(None if seed is None else f"{seed}/{self.request.choice}")  # noqa: S311

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt is in the KV cache, so that the sequence can be decoded."""
        return self.num_read == len(self.request.prompt)

    @property
    def num_cached(self) -> int:
        """Positions of the KV cache in use; the newest token is not in it yet."""
        return self.num_read + max(0, len(self.tokens) - 1)


def collect(outputs: Sequence[Output]) -> Generation:
    """Join the outputs of one finished sequence to its whole answer; raises the error that ended it."""
    last = outputs[-1]
    if last.error is not None:
        raise last.error
    if last.finish_reason is None:
        raise RequestError("the sequence is not finished; collect its outputs up to the one with a finish reason")
    return Generation(
        text="".join(output.text for output in outputs),
        tokens=tuple(chain.from_iterable(output.tokens for output in outputs)),
        finish_reason=last.finish_reason,
        num_prompt_tokens=len(last.request.prompt),
        num_generated=last.num_generated,
        prompt_tokens=tuple(chain.from_iterable(output.prompt_tokens for output in outputs)),
    )


def fit(num_prompt_tokens: int, max_tokens: int | None, max_length: int) -> int:
    """Return how many tokens may be generated after a prompt; `None` is as many as the context holds.

    Raises `RequestError` when the prompt and `max_tokens` do not fit into `max_length` tokens.

    >>> fit(10, None, 64), fit(10, 16, 64)
    (54, 16)
    """
    room = max_length - num_prompt_tokens
    if room < (1 if max_tokens is None else max_tokens):
        asked = f" and max_tokens={max_tokens} asks for more" if room > 0 else ""
        raise RequestError(
            f"the prompt has {num_prompt_tokens} tokens{asked}, and the context of this model is {max_length} tokens "
            f"for prompt and answer together; shorten the prompt or lower max_tokens",
            param="max_tokens" if room > 0 else "prompt",
            code="context_length_exceeded",
        )
    return room if max_tokens is None else max_tokens
