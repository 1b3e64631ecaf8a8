from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deepseek.core.errors import DataError, RequestError
from deepseek.data.chat_templates import CHATML, render_chat
from deepseek.data.tokenizing import END_OF_TEXT, Tokenizer, train_tokenizer

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BLOCKS = """{% for message in messages %}
    {% if message.role == "tool" %}{% continue %}{% endif %}
<{{ message.role }}> {{ message | tojson }}
{% endfor %}
{% if add_generation_prompt %}
<assistant> {{ strftime_now("%Y") }}
{% endif %}"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Is 1 < 2 & 'é'? "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]


def _tokenizer(template: str | None) -> Tokenizer:
    backend = train_tokenizer([], vocab_size=257).backend
    return Tokenizer(backend, END_OF_TEXT, bos_token=END_OF_TEXT, chat_template=template)


@pytest.mark.parametrize("template", [CHATML, LLAMA_2, BLOCKS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(template: str, add_generation_prompt: bool) -> None:
    ours = _tokenizer(template)
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours.backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
    expected = theirs.apply_chat_template(CHAT, chat_template=template, tokenize=False, **options)
    assert render_chat(ours, CHAT, **options) == expected


def test_without_a_template_a_chat_is_chatml() -> None:
    assert render_chat(_tokenizer(None), CHAT[-1:]) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_messages_that_the_template_refuses_are_a_request_error() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as raised:
        render_chat(_tokenizer(LLAMA_2), [{"role": "assistant", "content": "first"}])
    assert (raised.value.status, raised.value.param) == (400, "messages")


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ messages[9].role.upper() }}"])
def test_a_template_that_stumbles_over_messages_is_a_request_error(template: str) -> None:
    with pytest.raises(RequestError, match="refuses these messages"):
        render_chat(_tokenizer(template), CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(RequestError):
        render_chat(_tokenizer(template), list(CHAT))


def test_a_template_cannot_read_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    with pytest.raises(RequestError):
        render_chat(_tokenizer(f"{{% include '{tmp_path / 'secret'}' %}}"), CHAT)


def test_a_broken_template_names_its_line() -> None:
    with pytest.raises(DataError, match="broken at line 2"):
        render_chat(_tokenizer("\n{% if %}"), CHAT)
