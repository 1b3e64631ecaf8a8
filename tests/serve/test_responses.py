"""Answers as JSON values, without a server; OpenAI's client reads whole ones in test_openai_client.py."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek.serve import responses
from deepseek.serve.responses import ChatAnswer, CompletionAnswer
from deepseek.serve.sequences import (
    FinishReason,
    Generation,
    GenerationRequest,
    LiveSequence,
    Logprobs,
    Output,
    Token,
)

BYTES = {1: b"a", 2: b" b", 3: b"\xc3", 4: b"b", 5: b" b"}
REQUEST = GenerationRequest((1, 2), 3, prompt_logprobs=1)
TOKENS = (Token(3, 0, Logprobs(-1.0, ((3, -1.0), (1, -2.0)))), Token(2, 1, Logprobs(-0.5, ((2, -0.5), (4, -1.5)))))


def completion(**options: Any) -> CompletionAnswer:
    return CompletionAnswer("m", BYTES.__getitem__, created_s=7, key="k", **options)


def test_a_part_of_a_character_is_spelled_in_bytes_and_a_space_is_kept() -> None:
    generation = Generation("é b", TOKENS, FinishReason.LENGTH, 2, 2)
    (choice,) = completion().whole([generation], {})["choices"]
    assert choice["logprobs"] == {
        "tokens": ["bytes:\\xc3", " b"],
        "token_logprobs": [-1.0, -0.5],
        "top_logprobs": [{"bytes:\\xc3": -1.0, "a": -2.0}, {" b": -0.5, "b": -1.5}],
        "text_offset": [0, 1],
    }
    (choice,) = ChatAnswer("m", BYTES.__getitem__).whole([generation], {})["choices"]
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["bytes"], second["token"], second["bytes"]) == ("bytes:\\xc3", [0xC3], " b", [32, 98])
    assert [entry["token"] for entry in second["top_logprobs"]] == [" b", "b"]


def test_of_several_tokens_with_one_text_the_likeliest_is_reported() -> None:
    token = Token(5, 0, Logprobs(-3.0, ((2, -0.5), (5, -3.0))))
    (choice,) = completion().whole([Generation(" b", (token,), FinishReason.STOP, 1, 1)], {})["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{" b": -0.5}]


def test_a_scored_prompt_comes_first_and_offsets_count_from_its_start() -> None:
    prompt_tokens = (Token(1, 0), Token(2, 1, Logprobs(-0.25, ())))
    generation = Generation("é b", TOKENS, FinishReason.LENGTH, 2, 2, prompt_tokens)
    answer = completion(echoes=("a b",), is_scored=True)
    (choice,) = answer.whole([generation], {})["choices"]
    assert choice["text"] == "a bé b"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -1.0, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 3, 4]
    assert answer.opening(1) == []
    outputs = [
        Output(0, REQUEST, text="é", tokens=TOKENS[:1], prompt_tokens=prompt_tokens),
        Output(0, REQUEST, text=" b", tokens=TOKENS[1:], finish_reason=FinishReason.LENGTH),
    ]
    chunks = [answer.chunk(0, output)["choices"][0] for output in outputs]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert [name for chunk in chunks for name in chunk["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
    assert [at for chunk in chunks for at in chunk["logprobs"]["text_offset"]] == choice["logprobs"]["text_offset"]


def test_without_scores_there_are_no_log_probabilities_and_the_echo_opens_a_stream() -> None:
    answer = completion(echoes=("x", "y"))
    assert [chunk["choices"][0]["text"] for chunk in answer.opening(2)] == ["x", "y"]
    (choice,) = answer.whole([Generation("z", (Token(1, 0),), FinishReason.STOP, 1, 1)], {})["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("xz", None, "stop")


def test_a_prompt_with_several_choices_counts_once() -> None:
    sequences = [LiveSequence(GenerationRequest((1, 2, 3), 5, choice=choice)) for choice in range(3)]
    for number, sequence in enumerate(sequences):
        sequence.tokens += [9] * number
    assert responses.usage(sequences) == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (500, "server_error"), (503, "overloaded_error")],
)
def test_the_type_of_an_error_follows_its_status(status: int, kind: str) -> None:
    body = responses.error("no", status=status, param="n", code="c")
    assert body == {"error": {"message": "no", "type": kind, "param": "n", "code": "c"}}
