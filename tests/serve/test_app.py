"""The HTTP endpoints with raw requests: bad input, lost clients, full queues, failing engines, health, metrics."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from deepseek.core.errors import DataError
from deepseek.core.events import Event
from deepseek.data.chat_templates import MAX_PROCESSES
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.decoder.model import Decoder
from deepseek.serve.config import ServeConfig
from deepseek.serve.events import RequestServed
from deepseek.serve.server import Server, running_server

Make = Callable[..., Any]
LONG = {"model": "tiny", "prompt": "x", "max_tokens": 80, "ignore_eos": True}
SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": 0}


class Slow(Decoder):
    """A decoder that takes its time, so that something can happen meanwhile."""

    step_s = 0.02

    def forward(self, *args: Any, **keywords: Any) -> Any:
        time.sleep(self.step_s)
        return super().forward(*args, **keywords)


class Breakable(Slow):
    """A decoder that fails from some moment on."""

    is_broken = False

    def forward(self, *args: Any, **keywords: Any) -> Any:
        if self.is_broken:
            raise RuntimeError("the device is lost")
        return super().forward(*args, **keywords)


class Picky(Slow):
    """A decoder that fails on a prompt with one token, and returns no numbers for one with another."""

    raises, infects = 17, 18
    step_s = 0.005

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        with torch.no_grad():
            self.embed.weight[self.infects] = float("nan")  # and so are all its keys and values
            self.head.weight[[self.raises, self.infects]] = 0  # it never says them itself

    def forward(self, tokens_BT: Tensor, **keywords: Any) -> Any:
        if (tokens_BT == self.raises).any():
            raise RuntimeError("index out of range")
        return super().forward(tokens_BT, **keywords)


class Held(Decoder):
    """A decoder that does nothing until it is let go."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_free = threading.Event()
        self.is_free.set()

    def forward(self, *args: Any, **keywords: Any) -> Any:
        assert self.is_free.wait(60)
        return super().forward(*args, **keywords)


@pytest.fixture(scope="module")
def server(model: Decoder, tokenizer: Tokenizer) -> Iterator[Server]:
    with running_server(model, tokenizer, ServeConfig(port=0, model_name="tiny", max_body_bytes=5000)) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@contextlib.contextmanager
def serving(model: Decoder, tokenizer: Tokenizer, **settings: Any) -> Iterator[tuple[Server, httpx.Client]]:
    config = ServeConfig(**{"port": 0, "model_name": "tiny", "shutdown_timeout_s": 2} | settings)
    with running_server(model, tokenizer, config) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        yield server, client


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)


def read_metrics(client: httpx.Client) -> dict[str, float]:
    """Samples by name, and by name{finished_reason} where there is one."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            reason = sample.labels.get("finished_reason")
            found[sample.name + (f"{{{reason}}}" if reason else "")] = sample.value
    return found


def check_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


BAD_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"7",
    b"\xff\xfe",
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    b"[" * 4000,
    b'{"a":' * 900,
    b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 4500 + b"}",
    b"{}",
    b'{"prompt": "x"}',
]
BAD_VALUES: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": [""]} | {"max_tokens": 97},
    {"prompt": [[]]},
    {"prompt": [1, "x"]},
    {"prompt": [True]},
    {"prompt": [1.5]},
    {"prompt": [-1]},
    {"prompt": [10**30]},
    {"prompt": {"text": "x"}},
    {"prompt": 3},
    {"model": 3},
    {"max_tokens": -1},
    {"max_tokens": 2.5},
    {"max_tokens": "2"},
    {"max_tokens": True},
    {"max_tokens": 10**30},
    {"temperature": -0.1},
    {"temperature": "warm"},
    {"temperature": 1e999},
    {"top_p": 1.1},
    {"top_k": -2},
    {"n": 0},
    {"stop": ""},
    {"stop": ["a", 1]},
    {"stop": ["a"] * 17},
    {"stop": {"a": 1}},
    {"seed": "x"},
    {"stream": "yes"},
    {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include": True}},
    {"logprobs": 21},
    {"logprobs": True},
    {"best_of": 3},
    {"suffix": "end"},
    {"logit_bias": {"1": 5}},
    {"presence_penalty": 1},
    {"presence_penalty": False},
    {"best_of": True},
    {"n": 10**12},
    {"frequence_penalty": 1},
    {"messages": []},
]
BAD_CHATS: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": "Hi"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "wizard", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user", "content": "Hi", "mood": "good"}]},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"response_format": {"type": "json_object"}},
    {"top_logprobs": 3},
    {"logprobs": 3},
    {"max_tokens": 3, "max_completion_tokens": 4},
    {"max_tokens": 0},
    {"max_completion_tokens": 0},
    {"messages": [{"role": "assistant"}, {"role": "user", "content": None}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
    {"chat_template_kwargs": "enable_thinking"},
    {"chat_template_kwargs": {"messages": []}},
    {"chat_template_kwargs": {"add_generation_prompt": False}},
    {"chat_template_kwargs": {"tools": [1]}},
    {"parallel_tool_calls": 1},
    {"prompt": "x"},
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_body_that_is_not_a_request_is_refused(http: httpx.Client, body: bytes) -> None:
    check_error(http.post("/v1/completions", content=body), 400)


@pytest.mark.parametrize("change", BAD_VALUES, ids=str)
def test_a_wrong_value_is_refused_by_name(http: httpx.Client, change: dict[str, Any]) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x"} | change)
    error = check_error(http.post("/v1/completions", content=body), 400)
    assert error["param"] is None or error["param"].partition(".")[0] in change
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("change", BAD_CHATS, ids=str)
def test_a_wrong_chat_is_refused_by_name(http: httpx.Client, change: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]} | change
    error = check_error(http.post("/v1/chat/completions", json=body), 400)
    assert error["param"].partition(".")[0] in change


def test_a_misspelt_parameter_is_answered_with_the_nearest_one(http: httpx.Client) -> None:
    error = check_error(http.post("/v1/completions", json=SHORT | {"max_token": 3}), 400)
    assert "did you mean 'max_tokens'" in error["message"]
    assert error["code"] == "unknown_parameter"


def test_null_is_the_same_as_left_out(http: httpx.Client) -> None:
    body = SHORT | dict.fromkeys(["stop", "seed", "logprobs", "tools", "stream_options", "suffix", "n", "best_of"])
    assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions/", "/v1/embeddings", "/docs", "/v1/models/other"])
def test_an_unknown_path_is_a_json_error(http: httpx.Client, path: str) -> None:
    check_error(http.get(path), 404)


def test_a_wrong_method_is_a_json_error_that_names_the_right_ones(http: httpx.Client) -> None:
    answer = http.get("/v1/completions")
    check_error(answer, 405)
    assert answer.headers["allow"] == "POST"
    check_error(http.post("/healthz"), 405)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(http: httpx.Client, is_chunked: bool) -> None:
    content = b'{"model": "tiny", "prompt": "' + b"x" * 6000 + b'"}'
    answer = http.post("/v1/completions", content=iter([content]) if is_chunked else content)
    error = check_error(answer, 413)
    assert "5000 bytes" in error["message"]
    assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_context_that_is_too_long_is_refused_with_openais_code(http: httpx.Client) -> None:
    error = check_error(http.post("/v1/completions", json=SHORT | {"prompt": "漢" * 100}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert "96 tokens" in error["message"]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "漢" * 100}]}
    error = check_error(http.post("/v1/chat/completions", json=chat), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_request_ids_are_echoed_or_made(http: httpx.Client) -> None:
    assert http.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = [http.get("/healthz", headers=headers).headers["x-request-id"] for headers in ({}, {"X-Request-Id": "a b"})]
    assert len(set(made)) == 2
    assert all(len(each) == 32 for each in made)


def test_a_stream_is_server_sent_events_with_an_end_mark(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json=SHORT | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = answer.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


def test_health_and_readiness_are_good_in_a_running_server(http: httpx.Client) -> None:
    assert http.get("/healthz").json()["status"] == "ok"
    assert http.get("/readyz").json() == {"status": "ready"}


def test_metrics_count_what_was_asked_and_answered(model: Decoder, tokenizer: Tokenizer) -> None:
    with serving(model, tokenizer) as (_, http):
        for is_streamed in (False, True):
            body = SHORT | {"prompt": [1] * 7, "max_tokens": 5, "ignore_eos": True, "stream": is_streamed}
            assert http.post("/v1/completions", json=body).status_code == 200
        found = read_metrics(http)
    assert found["ds_prompt_tokens_total"] == 14
    assert found["ds_generation_tokens_total"] == 10
    assert found["ds_request_success_total{length}"] == 2
    assert found["ds_request_success_total{abort}"] == 0
    assert found["ds_time_to_first_token_seconds_count"] == 2
    assert found["ds_inter_token_latency_seconds_count"] == 8
    assert found["ds_e2e_request_latency_seconds_count"] == 2
    assert found["ds_request_queue_time_seconds_count"] == 2
    assert found["ds_e2e_request_latency_seconds_sum"] >= found["ds_time_to_first_token_seconds_sum"]
    gauges = ("ds_num_requests_running", "ds_num_requests_waiting", "ds_kv_cache_usage_perc")
    assert [found[name] for name in gauges] == [0, 0, 0]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_hangs_up_frees_its_slots(
    make_model: Make, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, path: str, is_streamed: bool
) -> None:
    body: dict[str, Any] = LONG | {"stream": is_streamed, "n": 3, "max_tokens": 40}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    with serving(make_model(Slow), tokenizer, max_num_seqs=2) as (server, http):
        engine = server.service.engine_loop.engine
        content = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            if is_streamed:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            wait_until(lambda: engine.num_running == 2 and engine.num_waiting == 1, "two run and one waits")
        wait_until(lambda: not engine.has_work, "the slots are free")
        found = read_metrics(http)
        assert found["ds_request_success_total{abort}"] == 3
        assert found["ds_generation_tokens_total"] < 3 * 40
        assert caplog.messages == [], "a client that hangs up is nothing to report"
        assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_body_that_does_not_come_is_given_up(model: Decoder, tokenizer: Tokenizer) -> None:
    with serving(model, tokenizer, body_timeout_s=0.1) as (server, _):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            with connection.makefile("rb") as reader:
                head, _, body = reader.read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408")
        assert json.loads(body)["error"]["code"] == "request_timeout"


def test_a_client_that_hangs_up_in_the_middle_of_its_body_does_no_harm(server: Server, http: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_full_queue_refuses_with_a_time_to_retry(make_model: Make, tokenizer: Tokenizer) -> None:
    with serving(make_model(Slow), tokenizer, max_num_seqs=1, max_queue=1, retry_after_s=7) as (server, http):
        engine = server.service.engine_loop.engine
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(http.post, "/v1/completions", json=LONG | {"max_tokens": 30}) for _ in range(2)]
            wait_until(lambda: (engine.num_running, engine.num_waiting) == (1, 1), "one runs and one waits")
            refused = http.post("/v1/completions", json=SHORT)
            refused_stream = http.post("/v1/completions", json=SHORT | {"stream": True})
            assert read_metrics(http)["ds_num_requests_waiting"] == 1
            assert [answer.result().status_code for answer in answers] == [200, 200]
        for answer in (refused, refused_stream):
            assert check_error(answer, 503)["type"] == "overloaded_error"
            assert answer.headers["retry-after"] == "7"
        assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_openais_client_waits_and_gets_through_a_full_queue(make_model: Make, tokenizer: Tokenizer) -> None:
    with serving(make_model(Slow), tokenizer, max_num_seqs=1, max_queue=0, retry_after_s=0) as (server, _):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=20) as client:
            ask: Any = {"model": "tiny", "prompt": "x", "max_tokens": 3}
            with ThreadPoolExecutor(3) as pool:
                answers = list(pool.map(lambda _: client.completions.create(**ask), range(3)))
        assert len(answers) == 3


def test_a_failed_engine_fails_loudly_and_for_good(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(Breakable)
    with serving(model, tokenizer) as (server, http), ThreadPoolExecutor(2) as pool:
        whole = pool.submit(http.post, "/v1/completions", json=LONG)
        streamed = pool.submit(http.post, "/v1/completions", json=LONG | {"stream": True})
        wait_until(lambda: server.service.engine_loop.engine.num_running == 2, "both run")
        model.is_broken = True
        error = check_error(whole.result(), 500)
        assert error["code"] == "engine_failed"
        assert "the device is lost" in error["message"]
        assert whole.result().headers["x-should-retry"] == "false"
        *_, last, rest = streamed.result().text.split("\n\n")
        assert rest == ""
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert http.get("/healthz").status_code == 503
        assert http.get("/readyz").status_code == 503
        check_error(http.post("/v1/completions", json=SHORT), 500)
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client,
            pytest.raises(openai.InternalServerError),
        ):
            client.completions.create(model="tiny", prompt="x")


def test_openais_client_raises_on_an_error_in_the_middle_of_a_stream(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(Breakable)
    with serving(model, tokenizer) as (server, _):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
        ask: Any = {"model": "tiny", "prompt": "x", "max_tokens": 80, "extra_body": {"ignore_eos": True}}
        with client, client.completions.create(stream=True, **ask) as stream:
            next(stream)
            model.is_broken = True
            with pytest.raises(openai.APIError, match="the device is lost"):
                list(stream)


def test_an_engine_that_is_stuck_is_not_healthy_and_an_idle_one_is(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(Held)
    with serving(model, tokenizer, stall_timeout_s=1) as (_, http), ThreadPoolExecutor(1) as pool:
        time.sleep(1.1)  # longer than the limit, with nothing to do
        wait_until(lambda: http.get("/healthz").status_code == 200, "an idle engine is well")
        model.is_free.clear()
        answer = pool.submit(http.post, "/v1/completions", json=SHORT)
        wait_until(lambda: http.get("/healthz").status_code == 503, "the stall shows")
        model.is_free.set()
        assert answer.result().status_code == 200
        wait_until(lambda: http.get("/healthz").status_code == 200, "the engine is well again")


def test_a_chat_template_that_refuses_is_the_clients_error(model: Decoder, tokenizer: Tokenizer) -> None:
    strict = Tokenizer(tokenizer.backend, tokenizer.eos_token, chat_template="{{ raise_exception('roles alternate') }}")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    with serving(model, strict) as (_, http):
        assert "roles alternate" in check_error(http.post("/v1/chat/completions", json=body), 400)["message"]


def test_a_broken_chat_template_stops_the_server_when_it_starts(model: Decoder, tokenizer: Tokenizer) -> None:
    broken = Tokenizer(tokenizer.backend, tokenizer.eos_token, chat_template="{% for %}")
    with pytest.raises(DataError, match="broken at line 1"), serving(model, broken):
        pass


def test_a_chat_gives_its_template_names_switches_and_documents(model: Decoder, tokenizer: Tokenizer) -> None:
    template = (
        "{% if messages[0].name != 'ann' or messages[1].reasoning_content != 'hm' or messages[1].content != 'no' "
        "or enable_thinking or documents[0].title != 'One' %}{{ raise_exception('not given') }}{% endif %}Hi"
    )
    body: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 2,
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be kind"}], "name": "ann"},
            {
                "role": "assistant",
                "content": None,
                "refusal": "no",
                "reasoning_content": "hm",
                "tool_calls": [],
                "annotations": [],
            },
        ],
        "documents": [{"title": "One"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    asking = Tokenizer(tokenizer.backend, tokenizer.eos_token, chat_template=template)
    with serving(model, asking) as (_, http):
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["usage"]["prompt_tokens"] == len(tokenizer.encode("Hi"))
        wrong = http.post("/v1/chat/completions", json=body | {"documents": [{"title": "Two"}]})
        assert "not given" in check_error(wrong, 400)["message"]


def test_a_prompt_that_breaks_the_model_is_one_error_and_the_others_are_served(
    make_model: Make, tokenizer: Tokenizer
) -> None:
    with serving(make_model(Picky), tokenizer) as (server, http), ThreadPoolExecutor(2) as pool:
        greedy = LONG | {"temperature": 0}
        expected = http.post("/v1/completions", json=greedy).json()["choices"][0]["text"]
        others = [pool.submit(http.post, "/v1/completions", json=greedy) for _ in range(2)]
        wait_until(lambda: server.service.engine_loop.engine.num_running == 2, "both run")
        for prompt in (Picky.raises, Picky.infects):
            for stream in (False, True):
                answer = http.post("/v1/completions", json=SHORT | {"prompt": [5, prompt], "stream": stream})
                if stream:
                    *_, last, rest = answer.text.split("\n\n")
                    assert rest == ""
                    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "sequence_failed"
                else:
                    assert check_error(answer, 500)["code"] == "sequence_failed"
                    assert answer.headers["x-should-retry"] == "false"
        assert [other.result().json()["choices"][0]["text"] for other in others] == [expected] * 2
        assert http.get("/healthz").status_code == 200
        assert http.post("/v1/completions", json=SHORT).status_code == 200
        assert read_metrics(http)["ds_request_success_total{error}"] == 4


@pytest.mark.parametrize(
    ("origins", "origin", "is_allowed"),
    [
        (None, "http://localhost:3000", True),
        (None, "http://127.0.0.1:8080", True),
        (None, "https://example.org", False),
        (None, "http://localhost.example.org:80", False),
        (("https://chat.example.org",), "https://chat.example.org", True),
        (("https://chat.example.org",), "http://localhost:3000", False),
        (("*",), "https://anywhere.example", True),
        ((), "http://localhost:3000", False),
    ],
)
def test_pages_of_allowed_origins_may_ask_from_a_browser(
    model: Decoder, tokenizer: Tokenizer, origins: tuple[str, ...] | None, origin: str, is_allowed: bool
) -> None:
    settings = {} if origins is None else {"allowed_origins": origins}
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with serving(model, tokenizer, **settings) as (_, http):
        asked = http.request("OPTIONS", "/v1/chat/completions", headers=preflight)
        assert (asked.status_code == 200) is is_allowed
        answer = http.post("/v1/completions", json=SHORT, headers={"Origin": origin})
        failed = http.post("/v1/completions", json={}, headers={"Origin": origin})
    assert answer.status_code == 200
    for each in (asked, answer, failed):
        assert (each.headers.get("access-control-allow-origin") == origin) is is_allowed
    assert failed.status_code == 400


def test_every_request_is_reported_without_its_text(model: Decoder, tokenizer: Tokenizer) -> None:
    events: list[Event] = []
    config = ServeConfig(port=0, model_name="tiny")
    with (
        running_server(model, tokenizer, config, listen=events.append) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        http.post("/v1/completions", json=SHORT | {"prompt": "secret"}, headers={"X-Request-Id": "mine"})
        http.post("/v1/completions", json={"model": "tiny", "promt": "secret"})
        http.get("/healthz")
        http.get("/v1/models")
    served = [event for event in events if isinstance(event, RequestServed)]
    assert [(event.method, event.path, event.status) for event in served] == [
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 400),
        ("GET", "/v1/models", 200),
    ]
    assert served[0].request_id == "mine"
    assert 0 < served[0].duration_s < 60
    assert "secret" not in json.dumps([event.to_dict() for event in events])


def test_special_bytes_in_a_prompt_come_back_with_echo(http: httpx.Client) -> None:
    prompt = 'a\x00b\u2028c"\\\n\r\tд'
    answer = http.post("/v1/completions", json=SHORT | {"prompt": prompt, "echo": True})
    assert answer.json()["choices"][0]["text"].startswith(prompt)
    streamed = http.post("/v1/completions", json=SHORT | {"prompt": prompt, "echo": True, "stream": True})
    assert json.loads(streamed.text.split("\n\n")[0].removeprefix("data: "))["choices"][0]["text"] == prompt


def test_a_crowd_in_which_half_hang_up_leaves_right_answers_and_an_empty_engine(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    with serving(model, tokenizer, max_num_seqs=3, max_queue=200, prefill_tokens=5) as (server, http):
        alone = {
            prompt: http.post("/v1/completions", json=SHORT | {"prompt": prompt, "max_tokens": 12}).json()
            for prompt in ("def ", "class Größe", "x" * 30, "import os")
        }

        def visit(index: int) -> None:
            prompt = list(alone)[index % 4]
            body = SHORT | {"prompt": prompt, "max_tokens": 12, "stream": index % 3 == 0}
            if index % 2:
                with contextlib.suppress(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.02) as hasty:
                    hasty.post("/v1/completions", json=body)
            elif body["stream"]:
                events = http.post("/v1/completions", json=body).text.split("\n\n")[:-2]
                chunks = [json.loads(event.removeprefix("data: ")) for event in events]
                text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
                assert text == alone[prompt]["choices"][0]["text"]
            else:
                answer = http.post("/v1/completions", json=body).json()
                assert answer["choices"][0]["text"] == alone[prompt]["choices"][0]["text"]

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(visit, range(64)))
        wait_until(lambda: not server.service.engine_loop.engine.has_work, "the engine is empty")
        assert server.service.engine_loop.engine.cache_usage == 0
        assert http.get("/healthz").status_code == 200


# Values that no parameter wants, or wants at other places.
ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3.5,
        1e308,
        10**30,
        -(10**30),
        2**63,
        "",
        "x",
        "16",
        "\ud800",
        "a\udc00b",
        "\x00",
        "🦄",
    ),
    *([], [[]], [None], [1], [[1]], [1, "a"], [10**12], ["", ""], ["a"] * 40, {}, [{}], {"type": "text"}, {"5": 100}),
    *([{"role": "user"}], [{"role": "user", "content": "x"}], {"include_usage": "yes"}, "auto"),
)
ODD_NAMES = (
    *("prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stream"),
    *("stream_options", "stop", "logprobs", "top_logprobs", "echo", "seed", "best_of", "suffix", "logit_bias", "tools"),
    *("response_format", "tool_choice", "user", "ignore_eos", "chat_template_kwargs", "documents", "model", "", "self"),
)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@given(
    is_chat=st.booleans(),
    odd=st.dictionaries(
        st.sampled_from(ODD_NAMES),
        st.sampled_from([*ODD_VALUES, nested(10), nested(300)]),
        min_size=1,
        max_size=3,
    ),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_bodies_are_answered_or_refused_and_never_break_anything(
    http: httpx.Client, is_chat: bool, odd: dict[str, Any]
) -> None:
    subject = {"messages": [{"role": "user", "content": "x"}]} if is_chat else {"prompt": "x"}
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    answer = http.post(path, content=json.dumps({"model": "tiny", "max_tokens": 2} | subject | odd))
    if answer.status_code != 200:
        assert answer.status_code in (400, 404)
        assert "\n" not in check_error(answer, answer.status_code)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "prompt": ["a", "b"], "n": 1000000000000}',
        b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b"[" * 4000,
        b'{"model":' * 500,
        b'{"model": "tiny", "prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        '{"model": "tiny", "prompt": "a"}'.encode("utf-16"),
    ],
    ids=range(7),
)
def test_a_hostile_body_costs_nothing_and_the_next_answer_is_right(http: httpx.Client, body: bytes) -> None:
    ask = SHORT | {"temperature": 0}
    before = http.post("/v1/completions", json=ask).json()["choices"]
    check_error(http.post("/v1/completions", content=body), 400)
    assert http.post("/v1/completions", json=ask).json()["choices"] == before


def test_chats_whose_templates_take_long_leave_room_for_others(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[int] = []
    may_end = threading.Event()

    def render(*_: Any, **__: Any) -> str:
        inside.append(1)
        assert may_end.wait(60)
        return "x"

    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    with serving(model, tokenizer) as (_, http), ThreadPoolExecutor(12) as pool:
        monkeypatch.setattr("deepseek.serve.app.render_chat", render)
        monkeypatch.setattr("deepseek.serve.app._TEMPLATE_WAIT_S", 60.0)
        asked = [pool.submit(http.post, "/v1/chat/completions", json=chat) for _ in range(MAX_PROCESSES + 4)]
        wait_until(lambda: len(inside) == MAX_PROCESSES, "as many chats are written as there may be")
        assert http.post("/v1/completions", json=SHORT).status_code == 200
        assert len(inside) == MAX_PROCESSES
        monkeypatch.setattr("deepseek.serve.app._TEMPLATE_WAIT_S", 0.01)
        assert check_error(http.post("/v1/chat/completions", json=chat), 503)["type"] == "overloaded_error"
        may_end.set()
        assert [answer.result().status_code for answer in asked] == [200] * len(asked)
