"""Write a chat as the prompt that a model was trained to continue.

A model folder brings its own way of doing so: a Jinja template in `tokenizer_config.json` or `chat_template.jinja`, in
the dialect of `transformers.apply_chat_template`. Where there is none, chats are written in ChatML, one
`<|im_start|>role ... <|im_end|>` block for each message. Called by servers for `/v1/chat/completions`, and by
`chat_tokens.py` for training, which also asks which characters the assistant said (`write_chat`).

    render_chat -> an idle process of template_worker.py -> text
                     `-> after MAX_RENDER_S it is killed, and the request ends with an error

Templates are code of strangers: they run in Jinja's immutable sandbox, in processes with limits on time, memory and
text, so that neither a template nor the messages that make it loop can stop a server. Cost: the first chat starts a
process (0.1 s; `check_template` does so when a server starts), later ones take well under a millisecond.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek.core.errors import DataError, OverloadedError, RequestError
from deepseek.data.tokenizing import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_RENDER_S = 2.0
MAX_PROCESSES = 4


@dataclass(frozen=True)
class WrittenChat:
    """A chat as text."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """The characters, from and to, that the template marks with `{% generation %}` as what the assistant said."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Write `messages`, each with `role` and `content`, as a prompt; special tokens are in it already.

    `add_generation_prompt` ends it where the assistant's answer begins; `tools` (JSON schemas), `documents` and other
    `variables` (`enable_thinking`, ...) are what the template may ask for. Raises `RequestError` when the template
    refuses the messages (roles in the wrong order, say) or does not come to an end, `OverloadedError` when all
    processes are busy, and `DataError` when the template itself is broken.

    >>> from deepseek.data.tokenizing import train_tokenizer
    >>> render_chat(train_tokenizer([], vocab_size=257), [{"role": "user", "content": "Hi"}])
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """
    written = write_chat(
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        documents=documents,
        variables=variables,
    )
    return written.text


def write_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> WrittenChat:
    """Write `messages` as `render_chat` does, and say which characters the template marks as generated."""
    special_tokens = {**tokenizer.special_tokens, "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    given = {
        **{name: token for name, token in special_tokens.items() if token is not None},
        "tools": None if tools is None else list(tools),
        "documents": None if documents is None else list(documents),
        **(variables or {}),
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    answer = _POOL.render(tokenizer.chat_template or CHATML, given)
    if "broken" in answer:
        raise DataError(
            f"the chat template is broken at line {answer['line']} ({answer['broken']}); mend it or remove it"
        )
    if "refused" in answer:
        raise RequestError(
            f"the model's chat template refuses these messages ({answer['refused']}); check their roles, order and "
            "content",
            param="messages",
        )
    return WrittenChat(answer["text"], tuple((begin, end) for begin, end in answer.get("generated", ())))


def check_template(tokenizer: Tokenizer) -> None:
    """Raise `DataError` when the chat template of `tokenizer` is broken; the first chat is then fast."""
    try:
        render_chat(tokenizer, [{"role": "user", "content": "Hi"}])
    except RequestError:
        return  # it is whole, and wants other messages


class _Worker:
    """One process of `template_worker.py`."""

    def __init__(self) -> None:
        from deepseek.data import template_worker

        self._process = subprocess.Popen(  # noqa: S603 - a file of ours, run by the interpreter that runs us
            [sys.executable, "-P", template_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, line: str) -> str:
        """Send one line and return the answer; an empty one when the process ended or took too long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(MAX_RENDER_S, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:  # killed before it had read the line
            return ""
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()


class _Pool:
    """Processes that are idle, started when they are needed and kept."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_PROCESSES)

    def render(self, source: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Render in an idle process and return its answer."""
        try:
            line = json.dumps({"source": source, "variables": variables})
        except (TypeError, ValueError, RecursionError) as error:
            return {"refused": f"they are not plain JSON: {error}"}
        if not self._places.acquire(timeout=2 * MAX_RENDER_S):
            raise OverloadedError(f"{MAX_PROCESSES} chat templates are being written already; try again later")
        try:
            return self._render(line)
        finally:
            self._places.release()

    def stop(self) -> None:
        """End all idle processes."""
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.stop()

    def _render(self, line: str) -> dict[str, Any]:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker()
        answer = worker.ask(line)
        if not answer.endswith("\n"):
            worker.stop()
            return {"refused": f"it did not come to an end within {MAX_RENDER_S:g} s"}
        with self._lock:
            self._idle.append(worker)
        parsed: dict[str, Any] = json.loads(answer)
        return parsed


_POOL = _Pool()
atexit.register(_POOL.stop)
