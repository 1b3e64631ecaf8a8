from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deepseek.core.errors import DataError, RequestError
from deepseek.data import chat_templates
from deepseek.data.chat_templates import CHATML, check_template, render_chat
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
    special_tokens = {"pad_token": END_OF_TEXT}
    return Tokenizer(backend, END_OF_TEXT, bos_token=END_OF_TEXT, chat_template=template, special_tokens=special_tokens)


def _theirs(ours: Tokenizer) -> PreTrainedTokenizerFast:
    names = dict.fromkeys(("eos_token", "bos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=ours.backend, **names)


MARKED = """{% set seen = namespace(count=0) %}{% for m in messages %}{% if m.role == 'assistant' %}
A: {% generation %}{% set mood = 'calm' %}{% set seen.count = seen.count + 1 %}{{ m.content }}{{ mood }}
{%- endgeneration %}{{ mood }}
{% else %}U: {{ m.content }}
{% endif %}{% endfor %}{{ seen.count }}"""
NAMES = (
    "{{ bos_token }}{{ pad_token }}{{ unk_token is defined }}{{ tools is none }}{{ documents is none }}{{ dict(a=1) }}"
)


@pytest.mark.parametrize("template", [CHATML, LLAMA_2, BLOCKS, MARKED, NAMES])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(template: str, add_generation_prompt: bool) -> None:
    ours = _tokenizer(template)
    theirs = _theirs(ours)
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


def test_tools_documents_and_switches_reach_the_template_as_in_transformers() -> None:
    template = (
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for d in documents or [] %}{{ d.title }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ messages | length }}"
    )
    tools = [
        {"type": "function", "function": {"name": "now", "description": "é <b>", "parameters": {"type": "object"}}}
    ]
    documents = [{"title": "One", "text": "first"}]
    ours = _tokenizer(template)
    options: dict[str, Any] = {"tools": tools, "documents": documents}
    expected = _theirs(ours).apply_chat_template(
        CHAT, chat_template=template, tokenize=False, enable_thinking=False, **options
    )
    given = render_chat(ours, CHAT, add_generation_prompt=False, variables={"enable_thinking": False}, **options)
    assert given == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro again() %}{% for i in range(9999) %}{{ again() }}{% endfor %}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_without_an_end_is_stopped_and_the_next_chat_is_served(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "MAX_RENDER_S", 1.0)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"did not come to an end|more memory|recursion"):
            render_chat(_tokenizer(template), CHAT)
    assert render_chat(_tokenizer("fine"), CHAT) == "fine"


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ 'x' * 5000000 }}",
    ],
)
def test_a_template_that_writes_gigabytes_is_refused_and_takes_none(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.data.chat_templates.MAX_RENDER_S", 300.0)  # memory ends it, on however slow a machine
    with pytest.raises(RequestError, match=r"more memory than a template may take|characters"):
        render_chat(_tokenizer(template), CHAT)
    assert render_chat(_tokenizer("fine"), CHAT) == "fine"


def test_what_is_not_json_is_refused_before_a_template_sees_it() -> None:
    with pytest.raises(RequestError, match="not plain JSON"):
        render_chat(_tokenizer("fine"), [{"role": "user", "content": object()}])


def test_a_private_name_cannot_be_stored() -> None:
    with pytest.raises(RequestError, match="private name '_x'"):
        render_chat(_tokenizer("{% set ns = namespace(_x=1) %}"), CHAT)


def test_checking_finds_a_broken_template_and_lets_one_that_wants_other_messages_pass() -> None:
    with pytest.raises(DataError, match="broken at line 1"):
        check_template(_tokenizer("{% endif %}"))
    check_template(_tokenizer("{{ raise_exception('a system message first') }}"))
