"""Rows of the forms in use become the same chat, and what is no chat is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepseek.data.chats import Chat, parse_chat, read_document
from deepseek.data.samples import BrokenSampleError
from deepseek.data.table_rows import TableRow

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


def parse(**values: Any) -> Chat:
    return parse_chat(TableRow("chats.jsonl:3", values))


@pytest.mark.parametrize(
    "values",
    [
        {"messages": MESSAGES},
        {"messages": json.dumps(MESSAGES)},
        {"messages": MESSAGES[1:], "system": "Be brief."},
        {"messages": [message | {"tool_calls": None} for message in MESSAGES], "conversations": None},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        {"system": "Be brief.", "conversations": [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"system": "Be brief.", "instruction": "Hi", "output": "Hello"},
        {"system": "Be brief.", "instruction": "Hi", "input": "", "output": "Hello"},
    ],
)
def test_every_form_is_the_same_chat(values: dict[str, Any]) -> None:
    chat = parse(**values)
    assert list(chat.messages) == MESSAGES
    assert chat.tools is None
    assert chat.answers == [2]
    assert read_document(chat.to_document()) == chat


def test_the_input_of_an_instruction_comes_after_it() -> None:
    chat = parse(instruction="Translate:", input="Hallo", output="Hello")
    assert chat.messages[0] == {"role": "user", "content": "Translate:\n\nHallo"}


def test_tool_calls_tools_and_weights_are_kept() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Add"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2", "weight": 1},
    ]
    chat = parse(messages=messages, tools=json.dumps([{"type": "function"}]))
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0}
    assert chat.messages[0]["content"] == messages[0]["content"]
    assert chat.answers == [3]
    assert chat.tools == ({"type": "function"},)
    assert read_document(chat.to_document()) == chat


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({}, "chats.jsonl:3 holds no chat; expected a column messages"),
        ({"messages": []}, "chats.jsonl:3 has no messages"),
        ({"messages": "[{"}, "chats.jsonl:3 has no JSON in 'messages'"),
        ({"messages": {"role": "user"}}, "chats.jsonl:3 has a dict in 'messages'; expected a list"),
        ({"messages": ["Hi"]}, "message 0 of chats.jsonl:3 is a str"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "message 0 of chats.jsonl:3 has the role 'bot'; expected"),
        ({"messages": [{"content": "Hi"}]}, "has the role None"),
        ({"messages": [{"role": "user"}]}, "message 0 of chats.jsonl:3 has no content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a list as content"),
        ({"messages": [{"role": "user", "content": "Hi", "weight": 0.5}]}, "has the weight 0.5"),
        ({"conversations": [{"from": "alien", "value": "Hi"}]}, "has the role 'alien'"),
        ({"conversations": [{"from": ["gpt"], "value": "Hi"}]}, "has the role"),
        ({"instruction": "Hi"}, "chats.jsonl:3 has nothing in 'output'"),
        ({"instruction": "Hi", "output": " "}, "chats.jsonl:3 has an empty text in 'output'"),
    ],
)
def test_what_is_no_chat_is_named(values: dict[str, Any], seen: str) -> None:
    with pytest.raises(BrokenSampleError) as raised:
        parse(**values)
    assert seen in str(raised.value)
