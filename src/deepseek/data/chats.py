"""Chats from rows of tables: messages with roles, however their columns are called.

    messages: [{"role": "user", "content": "Hi"}, ...]        as OpenAI writes them, with tool calls
    conversations: [{"from": "human", "value": "Hi"}, ...]    ShareGPT
    instruction, input, output                                Alpaca: one question, one answer
    tools, system                                             beside any of them

`parse_chat` makes one `Chat` of a row, in the first form; `chat_corpus.py` calls it for each. A cell may also hold its
JSON as a text, as CSV has it. What is no chat is refused with the name of its row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepseek.data.documents import Document
from deepseek.data.samples import BrokenSampleError
from deepseek.data.table_rows import TableColumns, TableRow

COLUMNS = TableColumns((), ("messages", "conversations", "instruction", "input", "output", "tools", "system"))
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# What ShareGPT calls them.
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation, as chat templates take it."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    """JSON schemas of functions that the assistant may call."""

    @property
    def answers(self) -> list[int]:
        """The messages of the assistant that are to be learned: all but those of weight 0."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and message.get("weight", 1)
        ]

    def to_document(self) -> Document:
        """Write it as JSON, which says whether two chats are the same."""
        return Document(self.name, json.dumps([self.messages, self.tools]))


def read_document(document: Document) -> Chat:
    """Return the chat that `Chat.to_document` wrote."""
    messages, tools = json.loads(document.text)
    return Chat(document.name, tuple(messages), None if tools is None else tuple(tools))


def parse_chat(row: TableRow) -> Chat:
    """Return the chat in `row`; raises `BrokenSampleError` where there is none."""
    messages = _parse_messages(row)
    if not messages:
        raise BrokenSampleError(f"{row.name} has no messages; expected at least one of the user and one answer")
    system = row.values.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = _read_list(row, "tools")
    return Chat(row.name, tuple(messages), tuple(tools) if tools else None)


def _parse_messages(row: TableRow) -> list[Message]:
    if row.values.get("messages") is not None:
        return [_parse_message(row, number, given) for number, given in enumerate(_read_list(row, "messages"))]
    if row.values.get("conversations") is not None:
        turns = enumerate(_read_list(row, "conversations"))
        return [_parse_message(row, number, _rename_turn(given)) for number, given in turns]
    if row.values.get("instruction") is not None:
        asked = [row.text("instruction")]
        if row.values.get("input"):
            asked.append(row.text("input"))
        return [{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": row.text("output")}]
    raise BrokenSampleError(
        f"{row.name} holds no chat; expected a column messages, conversations, or instruction with output"
    )


def _rename_turn(turn: Any) -> Any:
    """Write a turn of ShareGPT with the names of messages; one that has them already is left as it is."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = turn["from"]
    known = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": known, "content": turn.get("value"), "weight": turn.get("weight")}


def _parse_message(row: TableRow, number: int, given: Any) -> Message:
    where = f"message {number} of {row.name}"
    if not isinstance(given, dict):
        raise BrokenSampleError(f"{where} is a {type(given).__name__}; expected an object with role and content")
    message = {key: value for key, value in given.items() if value is not None}  # Parquet fills fields up with null
    role = message.get("role")
    if role not in ROLES:
        raise BrokenSampleError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}")
    if message.setdefault("weight", 1) not in (0, 1):
        raise BrokenSampleError(f"{where} has the weight {message['weight']!r}; expected 1 to learn it, 0 not to")
    if message["weight"] == 1:
        del message["weight"]
    content = message.get("content")
    if content is None and role == "assistant" and (message.get("tool_calls") or message.get("function_call")):
        content = message["content"] = ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return message
    if not isinstance(content, str):
        seen = "no content" if content is None else f"a {type(content).__name__} as content"
        raise BrokenSampleError(f"{where} has {seen}; expected text, since a language model learns text alone")
    return message


def _read_list(row: TableRow, column: str) -> list[Any]:
    value = row.values.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise BrokenSampleError(f"{row.name} has no JSON in {column!r} ({error}); expected a list") from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise BrokenSampleError(f"{row.name} has a {type(value).__name__} in {column!r}; expected a list")
    return value
