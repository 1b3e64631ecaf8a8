"""Writing a chat as the prompt that a model was trained to continue.

A model folder brings its own way of doing so: a Jinja template in `tokenizer_config.json` or `chat_template.jinja`, in
the dialect of `transformers.apply_chat_template`. Where there is none, chats are written in ChatML, one
`<|im_start|>role ... <|im_end|>` block for each message. Called by servers for `/v1/chat/completions`.

Templates are code of strangers: they run in Jinja's immutable sandbox, which gives them the messages and no way to
files, modules or the objects' internals. Cost: compiled once for each template, then microseconds a chat.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from deepseek.core.errors import DataError, RequestError
from deepseek.data.tokenizing import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> str:
    """Write `messages` as a prompt, each with `role` and `content`; special tokens are in it already.

    `add_generation_prompt` ends it where the assistant's answer begins. Raises `RequestError` when the template
    refuses the messages (roles in the wrong order, say), and `DataError` when the template itself is broken.

    >>> from deepseek.data.tokenizing import train_tokenizer
    >>> render_chat(train_tokenizer([], vocab_size=257), [{"role": "user", "content": "Hi"}])
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """
    from jinja2 import TemplateError

    template = _compile(tokenizer.chat_template or CHATML)
    try:
        return template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token,
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise RequestError(
            f"the model's chat template refuses these messages ({error}); check their roles, order and content",
            param="messages",
        ) from error


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _format_now
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is broken at line {error.lineno} ({error}); mend it or remove it"
        ) from error


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _format_now(layout: str) -> str:
    return datetime.datetime.now().astimezone().strftime(layout)
