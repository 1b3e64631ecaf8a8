"""Request bodies: any bytes give a body or one `RequestError`, and nothing is read into them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import RequestError
from deepseek.serve.requests import IGNORED, NEUTRAL, ChatBody, CompletionBody, parse

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*CompletionBody.model_fields, *ChatBody.model_fields, *NEUTRAL, *IGNORED]) | st.text(
    max_size=8
)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_body_or_a_request_error(content: bytes) -> None:
    for body in (CompletionBody, ChatBody):
        with pytest.raises(RequestError):
            parse(body, content)


@given(changes=st.dictionaries(names, values, max_size=4))
def test_any_json_is_a_body_or_a_request_error_of_one_line(changes: dict[str, Any]) -> None:
    whole: dict[Any, dict[str, Any]] = {
        CompletionBody: {"model": "m", "prompt": "x"},
        ChatBody: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    }
    for body, base in whole.items():
        try:
            parsed = parse(body, json.dumps(base | changes).encode())
        except RequestError as error:
            assert error.status == 400
            assert "\n" not in str(error).partition(": ")[0]
        else:
            unset = {key for key, value in (base | changes).items() if value is None}
            for name in set(changes) - unset - IGNORED - set(NEUTRAL):
                assert name in body.model_fields, "what was accepted is known"
            assert parsed.model == (base | changes)["model"]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert parse(CompletionBody, json.dumps({"model": "m", "prompt": prompt}).encode()).prompts == prompts


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_unsupported_parameter_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    base = {"model": "m", "prompt": "x"}
    for neutral in NEUTRAL[name]:
        assert parse(CompletionBody, json.dumps(base | {name: neutral}).encode()).prompt == "x"
    with pytest.raises(RequestError, match="not supported") as caught:
        parse(CompletionBody, json.dumps(base | {name: {"something": "else"}}).encode())
    assert caught.value.param == name


def test_errors_do_not_repeat_a_long_input() -> None:
    content = json.dumps({"model": "m", "prompt": "x", "max_tokens": "9" * 10_000}).encode()
    with pytest.raises(RequestError) as caught:
        parse(CompletionBody, content)
    assert len(str(caught.value)) < 200


def test_a_byte_order_mark_before_a_body_is_passed_over():
    content = b'{"model": "m", "prompt": "def "}'
    assert parse(CompletionBody, b"\xef\xbb\xbf" + content) == parse(CompletionBody, content)
