"""OpenAI's own Python client as the judge of the server; expected texts come from the engine without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import torch

from deepseek.data.chat_templates import render_chat
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.decoder.model import Decoder
from deepseek.serve.config import ServeConfig
from deepseek.serve.engine import Engine, Generation
from deepseek.serve.sequences import Sampling
from deepseek.serve.server import Server, running_server

MODEL = "tiny"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(model: Decoder, tokenizer: Tokenizer) -> Iterator[Server]:
    config = ServeConfig(port=0, model_name=MODEL, max_num_seqs=4, prefill_tokens=8, max_queue=20)
    with running_server(model, tokenizer, config) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def generate(model: Decoder, tokenizer: Tokenizer) -> Callable[..., Generation]:
    engine = Engine(model, tokenizer)

    def alone(prompt: str | list[int], **options: Any) -> Generation:
        return engine.generate([prompt], **options)[0]

    return alone


def spell(content: bytes) -> str:
    """A token's bytes as OpenAI writes them: text, or `bytes:\\xc3` for a part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + repr(content)[2:-1]


def test_a_completion_is_what_the_engine_says(client: openai.OpenAI, generate: Any, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model=MODEL, prompt="def ", max_tokens=9, temperature=0)
    expected = generate("def ", max_tokens=9)
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode("def "))
    assert answer.usage.completion_tokens == expected.num_generated
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI, generate: Any) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="def ", max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    expected = generate("def ", max_tokens=20)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected.text
    assert len({chunk.id for chunk in chunks}) == 1
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == expected.finish_reason
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.num_generated
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len(chunks) > 5


def test_a_stream_without_usage_ends_with_its_last_choice(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="def ", max_tokens=3, temperature=0, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_all_prompt_forms_and_several_choices_are_answered_in_order(
    client: openai.OpenAI, generate: Any, tokenizer: Tokenizer
) -> None:
    texts = ["def ", "class Größe", "x"]
    ids = [tokenizer.encode(text) for text in texts]
    expected = [generate(text, max_tokens=6).text for text in texts]
    ask = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    for prompt, answers in ((texts, expected), (ids, expected), (texts[1], [expected[1]]), (ids[1], [expected[1]])):
        found = client.completions.create(prompt=prompt, **ask).choices  # type: ignore[call-overload]
        assert [choice.text for choice in found] == answers
        assert [choice.index for choice in found] == list(range(len(answers)))
    doubled = client.completions.create(prompt=texts, n=2, **ask)  # type: ignore[call-overload]
    assert [choice.text for choice in doubled.choices] == [text for text in expected for _ in range(2)]
    assert doubled.usage.prompt_tokens == sum(map(len, ids))
    streamed = [""] * 6
    for chunk in client.completions.create(prompt=texts, n=2, stream=True, **ask):  # type: ignore[call-overload]
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in doubled.choices]


def test_echo_puts_the_prompt_first(client: openai.OpenAI, generate: Any, tokenizer: Tokenizer) -> None:
    ask: Any = {"model": MODEL, "max_tokens": 4, "temperature": 0, "echo": True}
    expected = "class Größe" + generate("class Größe", max_tokens=4).text
    assert client.completions.create(prompt="class Größe", **ask).choices[0].text == expected
    ids = tokenizer.encode("class Größe")
    assert client.completions.create(prompt=ids, **ask).choices[0].text == expected
    chunks = client.completions.create(prompt=ids, stream=True, **ask)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected


def test_max_tokens_defaults_to_sixteen_or_what_fits(client: openai.OpenAI) -> None:
    for prompt, expected in (([1] * 5, 16), ([1] * 90, 6)):
        answer = client.completions.create(model=MODEL, prompt=prompt, extra_body={"ignore_eos": True})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == expected
        assert answer.choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_text(client: openai.OpenAI, generate: Any) -> None:
    whole = generate("def ", max_tokens=30).text
    stop = whole[5:8]
    answer = client.completions.create(model=MODEL, prompt="def ", max_tokens=30, temperature=0, stop=stop)
    assert answer.choices[0].text == whole.partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.completions.create(
        model=MODEL, prompt="def ", max_tokens=30, temperature=0, stop=["never", stop], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.partition(stop)[0]


def test_a_seed_repeats_an_answer_and_sampling_settings_matter(client: openai.OpenAI, generate: Any) -> None:
    ask: Any = {"model": MODEL, "prompt": "def ", "max_tokens": 20, "temperature": 1.4, "top_p": 0.99}
    first, again, other = (client.completions.create(seed=seed, **ask).choices[0].text for seed in (5, 5, 6))
    assert first == again == generate("def ", max_tokens=20, sampling=Sampling(1.4, 0, 0.99, 5)).text
    assert first != other
    only_best = client.completions.create(seed=5, extra_body={"top_k": 1}, **ask).choices[0].text
    assert only_best == generate("def ", max_tokens=20).text


def test_log_probabilities_of_a_completion(client: openai.OpenAI, model: Decoder, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model=MODEL, prompt="def ", max_tokens=5, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs and logprobs.text_offset
    with torch.no_grad():
        expected_V = torch.log_softmax(model(torch.tensor([tokenizer.encode("def ")]))[0, -1], -1)
    assert logprobs.token_logprobs[0] == pytest.approx(float(expected_V.max()), abs=1e-4)
    assert logprobs.tokens[0] == spell(tokenizer.token_bytes(int(expected_V.argmax())))
    assert max(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[0]
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert len(logprobs.tokens) == 5


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_echo_with_logprobs_scores_the_prompt(
    client: openai.OpenAI, model: Decoder, tokenizer: Tokenizer, max_tokens: int, is_streamed: bool
) -> None:
    """What lm-evaluation-harness asks for; the prompt is longer than one chunk."""
    text = "def add(left, right):\n    return left + right\n\nclass Größe"
    ids = tokenizer.encode(text)
    ask: Any = {"model": MODEL, "prompt": text, "max_tokens": max_tokens, "temperature": 0, "logprobs": 2, "echo": True}
    if is_streamed:
        with client.completions.create(stream=True, **ask) as stream:
            chunks = [chunk.choices[0] for chunk in stream]
        answer = "".join(chunk.text for chunk in chunks)
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
        for chunk in chunks:
            for name, column in columns.items():
                column += getattr(chunk.logprobs, name) if chunk.logprobs else []
    else:
        choice = client.completions.create(**ask).choices[0]
        answer, columns = choice.text, choice.logprobs.model_dump() if choice.logprobs else {}
        assert choice.finish_reason == "length"
    assert answer.startswith(text)
    with torch.no_grad():
        expected_TV = torch.log_softmax(model(torch.tensor([ids]))[0].double(), -1)
    assert columns["token_logprobs"][0] is None and columns["top_logprobs"][0] is None
    expected = [float(expected_TV[at, ids[at + 1]]) for at in range(len(ids) - 1)]
    assert columns["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert len(columns["tokens"]) == len(ids) + max_tokens
    assert columns["text_offset"][: len(ids)] == [
        len(tokenizer.decode(ids[:at]).removesuffix("\N{REPLACEMENT CHARACTER}")) for at in range(len(ids))
    ]
    assert all(offset >= len(text) for offset in columns["text_offset"][len(ids) :])


def test_an_empty_prompt_is_the_beginning_of_a_document(
    client: openai.OpenAI, generate: Any, tokenizer: Tokenizer
) -> None:
    expected = generate([tokenizer.eos_id], max_tokens=5).text
    ask: Any = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    assert client.completions.create(prompt="", **ask).choices[0].text == expected
    assert client.completions.create(prompt=None, **ask).choices[0].text == expected
    assert [choice.text for choice in client.completions.create(prompt=["", ""], **ask).choices] == [expected] * 2


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2).choices[0].message
    messages: Any = [*MESSAGES, first.model_dump(), {"role": "user", "content": "more"}]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).choices[0].finish_reason


def test_a_chat_is_the_completion_of_its_template(client: openai.OpenAI, generate: Any, tokenizer: Tokenizer) -> None:
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    expected = generate(tokenizer.encode(render_chat(tokenizer, messages)), max_tokens=12)
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=12, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected.text


def test_newer_forms_of_messages_are_understood(client: openai.OpenAI, generate: Any, tokenizer: Tokenizer) -> None:
    plain: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hi"},
    ]
    newer: Any = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "Ho", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "Hi"},
    ]
    expected = generate(tokenizer.encode(render_chat(tokenizer, plain)), max_tokens=5).text
    answer = client.chat.completions.create(model=MODEL, messages=newer, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == expected


def test_a_chat_without_a_limit_fills_the_context(client: openai.OpenAI, server: Server, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == server.service.engine_loop.engine.max_length
    assert answer.choices[0].finish_reason == "length"


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    for entry in content:
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert len(entry.top_logprobs) == 3
        assert entry.bytes is not None
        assert spell(bytes(entry.bytes)) == entry.token


def test_several_choices_of_a_chat_differ(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, max_tokens=12, temperature=1.5, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [card.id for card in listed] == [MODEL]
    assert client.models.retrieve(MODEL) == listed[0]
    assert listed[0].object == "model"
    with pytest.raises(openai.NotFoundError, match="other/name"):
        client.models.retrieve("other/name")


def test_answers_at_once_are_those_alone(server: Server, generate: Any) -> None:
    prompts = [f"def f{index}(" for index in range(12)]

    async def whole(client: openai.AsyncOpenAI, prompt: str) -> str:
        answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=10, temperature=0)
        return answer.choices[0].text

    async def streamed(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=10, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            work = [(whole, streamed)[index % 2](client, prompt) for index, prompt in enumerate(prompts)]
            return await asyncio.gather(*work)

    assert asyncio.run(ask()) == [generate(prompt, max_tokens=10).text for prompt in prompts]


@pytest.mark.parametrize(
    ("ask", "error", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"prompt": [1] * 200}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"prompt": "x", "max_tokens": 10**6}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": "nine"}, openai.BadRequestError, "max_tokens", "invalid_value"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty", "unsupported_parameter"),
        ({"extra_body": {"tempretaure": 1}}, openai.BadRequestError, "tempretaure", "unknown_parameter"),
        ({"n": 1000}, openai.BadRequestError, "n", None),
    ],
)
def test_errors_are_typed_and_name_the_parameter(
    client: openai.OpenAI, ask: dict[str, Any], error: type[openai.APIStatusError], param: str, code: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "x"} | ask)
    assert caught.value.param == param
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"


def test_errors_come_before_a_stream_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[1] * 200, stream=True)


def test_account_parameters_are_accepted(client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="x", max_tokens=1, user="me", frequency_penalty=0, logit_bias={})
    client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, metadata={"a": "b"}, response_format={"type": "text"}
    )


def test_a_key_is_wanted_where_one_is_set(model: Decoder, tokenizer: Tokenizer) -> None:
    with running_server(model, tokenizer, ServeConfig(port=0, model_name=MODEL), api_key="secret-1") as server:
        good = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret-1", max_retries=0)
        bad = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret-2", max_retries=0)
        with good, bad:
            assert good.completions.create(model=MODEL, prompt="x", max_tokens=1).choices
            for call in (bad.models.list, lambda: bad.completions.create(model=MODEL, prompt="x")):
                with pytest.raises(openai.AuthenticationError) as caught:
                    call()
                assert caught.value.code == "invalid_api_key"
                assert "secret" not in str(caught.value)
    assert "secret-1" not in repr(server.service)
