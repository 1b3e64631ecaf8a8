"""Request bodies of the OpenAI API, one pydantic class each, and the refusal of everything that is not understood.

    bytes -> JSON -> known parameters only -> typed body -> Sampling and prompts

A parameter that this server does not implement is refused by name, unless its value is the one that asks for nothing; a
few that only concern OpenAI's own accounts are accepted. `null` is the same as leaving a parameter out. Types are
strict: "16" is no number. Extensions beyond OpenAI: `top_k`, `ignore_eos`, `documents` and `chat_template_kwargs` (what
a chat template may ask for, `enable_thinking` above all), named as in vLLM.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from deepseek.core.errors import RequestError
from deepseek.core.names import explain_unknown
from deepseek.serve.sequences import Sampling

B = TypeVar("B", bound="GenerationBody")

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # what OpenAI gives a completion that does not say

IGNORED = frozenset(
    ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
"""Parameters that concern OpenAI's accounts, and change no answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters that are not implemented, with the values that ask for nothing."""

_SET_BY_SERVER = ("messages", "add_generation_prompt", "tools", "documents")
"""Variables of a chat template that are not for `chat_template_kwargs` to set."""

TokenId = Annotated[int, Field(ge=0)]
Prompt = str | list[TokenId] | list[str] | list[list[TokenId]]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(_Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class RefusalPart(_Body):
    """A part of an earlier answer that declined to answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """Return the text of the refusal."""
        return self.refusal


class Message(_Body):
    """One message of a conversation; an earlier answer may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    name: str | None = None
    """Which of several participants speaks; templates may ask for it."""
    reasoning_content: str | None = None
    """The model's reasoning before an earlier answer; templates may ask for it."""
    refusal: str | None = None
    annotations: list[Any] = Field(default_factory=list)
    tool_calls: list[Any] = Field(default_factory=list, max_length=0)

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, value: Any) -> Any:
        for part in value if isinstance(value, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("text", "refusal"):
                raise ValueError(f"a part of a message is of type {kind!r} and this server reads text; send text parts")
        return value

    @model_validator(mode="after")
    def _check_presence(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} has no content; send its text")
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""

    @property
    def as_template_sees_it(self) -> dict[str, str]:
        """Role, text and what else templates may ask for; OpenAI's newer name of the system is the older one."""
        role = "system" if self.role == "developer" else self.role
        extras = {"name": self.name, "reasoning_content": self.reasoning_content}
        return {"role": role, "content": self.text} | {key: value for key, value in extras.items() if value is not None}


class GenerationBody(_Body, ABC):
    """Settings that completions and chat completions share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    ignore_eos: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> list[str]:
        stop = [value] if isinstance(value, str) else value
        if not isinstance(stop, list) or not all(isinstance(string, str) and string for string in stop):
            raise ValueError("stop is neither a string nor a list of strings, or one of them is empty")
        if len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(stop)} strings; send at most {MAX_STOP_STRINGS}")
        return stop

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most, if the request says."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report per token; `None` is no log-probabilities at all."""

    @property
    def sampling(self) -> Sampling:
        """How tokens are to be chosen."""
        return Sampling(self.temperature, max(0, self.top_k), self.top_p, self.seed, self.num_logprobs)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as the engine takes it."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check(self) -> None:
        """Raise `RequestError` where two parameters contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is set and stream is not; send stream=true", param="stream_options")


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompt = ""
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        if not _is_prompt(value):
            raise ValueError(
                "prompt is empty or of a wrong type; send a string, a list of strings, a list of token ids or a list "
                "of lists of token ids"
            )
        return value

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        one_of_ids = isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if one_of_ids else self.prompt)

    @property
    def prompt_logprobs(self) -> int | None:
        """Alternatives to report per prompt token; a prompt that nothing is added to is scored all the same."""
        if self.echo and self.logprobs is not None:
            return self.logprobs
        return 0 if self.limit == 0 else None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    documents: list[dict[str, Any]] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        for name in _SET_BY_SERVER:
            if name in self.chat_template_kwargs:
                raise RequestError(
                    f"chat_template_kwargs has {name!r}, which the server sets itself; leave it out",
                    param="chat_template_kwargs",
                    code="unsupported_parameter",
                )
        if self.limit == 0:
            raise RequestError("max_tokens is 0 and a chat wants an answer; send 1 or more", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is set and logprobs is not; send logprobs=true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ; "
                "send one of them",
                param="max_tokens",
            )


def parse(body: type[B], content: bytes) -> B:
    """Read a request body; raises `RequestError` (400) that names the parameter at fault.

    >>> parse(CompletionBody, b'{"model": "m", "prompt": "def "}').prompts
    ['def ']
    """
    try:
        values = from_json(content.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)  # as RFC 8259 lets a reader do
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise RequestError(f"the body is a JSON {_json_type(values)}; send an object", code="invalid_json")
    try:
        parsed = body(**_select(_without_nulls(values), body))
    except ValidationError as error:
        raise _explain(error) from None
    parsed.check()
    return parsed


def _select(values: dict[str, Any], body: type[GenerationBody]) -> dict[str, Any]:
    """Select the parameters that `body` has; raises `RequestError` for one that would have to be disregarded."""
    selected = {}
    for name, value in values.items():
        if name in body.model_fields:
            selected[name] = value
        elif name in NEUTRAL:
            _require_neutral(name, value)
        elif name not in IGNORED:
            raise RequestError(
                explain_unknown("parameter", name, body.model_fields), param=name, code="unknown_parameter"
            )
    return selected


def _require_neutral(name: str, value: Any) -> None:
    # True equals 1 in Python, and is another value in JSON.
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]):
        raise RequestError(
            f"parameter {name!r} is not supported by this server; leave it out",
            param=name,
            code="unsupported_parameter",
        )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_prompt(value: Any) -> bool:
    """Return whether `value` has one of the four shapes, nothing in it empty; ids are checked by type only."""
    return (
        isinstance(value, str)
        or _are_ids(value)
        or _are(value, str)
        or (_are(value, list) and all(map(_are_ids, value)))
    )


def _are_ids(value: Any) -> bool:
    return _are(value, int) and not any(isinstance(item, bool) for item in value)


def _are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _explain(error: ValidationError) -> RequestError:
    """Explain the first problem in one sentence."""
    problem = error.errors(include_url=False)[0]
    param = ".".join(map(str, _location(problem["loc"])))
    if problem["type"] == "missing":
        return RequestError(f"parameter {param!r} is missing; send it", param=param, code="missing_parameter")
    if problem["type"] == "value_error":
        return RequestError(str(problem["ctx"]["error"]), param=param, code="invalid_value")
    message = f"parameter {param!r} is {_shorten(problem['input'])}: {problem['msg'].lower()}"
    return RequestError(message, param=param, code="invalid_value")


def _location(location: Sequence[int | str]) -> list[int | str]:
    """Drop pydantic's names for the members of a union, which no client has sent."""
    return [part for part in location if isinstance(part, int) or (part.isidentifier() and part not in {"str", "int"})]


def _shorten(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
