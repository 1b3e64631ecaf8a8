"""The HTTP endpoints as a starlette application: OpenAI's completions, chat and models, health checks and metrics.

    request -> key, size -> body -> prompts -> EngineLoop.open -> whole answer, or server-sent events
                                                  `-> the client hangs up: the stream is closed, its slots are freed

Errors of every kind leave in one shape, `{"error": {message, type, param, code}}`. Status 503 carries `Retry-After`;
status 500 carries `x-should-retry: false`, since an engine that failed stays so. Keys protect `/v1`; health and metrics
are for the machine room and stay open.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek.core.errors import DeepSeekError, OverloadedError, RequestError
from deepseek.data.chat_templates import MAX_PROCESSES, render_chat
from deepseek.serve import responses
from deepseek.serve.config import ServeConfig
from deepseek.serve.engine_loop import EngineLoop, Stream
from deepseek.serve.events import Listener, RequestServed, ignore
from deepseek.serve.metrics import CONTENT_TYPE, Metrics
from deepseek.serve.requests import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, GenerationBody, parse
from deepseek.serve.responses import Answer, ChatAnswer, CompletionAnswer, Json
from deepseek.serve.sequences import Generation, GenerationRequest, Output, collect

B = TypeVar("B", bound=GenerationBody)
T = TypeVar("T")
_TEMPLATE_WAIT_S = 4.0  # for one of the processes that write chats; each chat has half of it
_CLIENT_CLOSED = 499  # nginx's status for a client that hung up; nobody is left to read it
_REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


@dataclass
class Service:
    """State that the endpoints share."""

    engine_loop: EngineLoop
    metrics: Metrics
    config: ServeConfig
    api_key: str | None = field(default=None, repr=False)
    listen: Listener = ignore
    created_s: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    """Whether the server is on its way out and takes no new requests."""
    template_places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_PROCESSES))
    """For chats being written, so that slow templates leave threads to everything else."""

    @property
    def obstacle(self) -> str | None:
        """Why requests would not be served, if they would not."""
        if self.is_draining:
            return "the server is shutting down"
        if not self.engine_loop.is_alive:
            return "the engine failed or stalled"
        return None if self.engine_loop.is_ready else "the model is being loaded"

    @property
    def card(self) -> Json:
        """The one model, as `/v1/models` shows it."""
        return responses.model_card(self.config.model_name, self.created_s, self.engine_loop.engine.max_length)

    def require_model(self, name: str) -> None:
        """Raise `RequestError` (404) unless `name` is the model that is served."""
        if name != self.config.model_name:
            raise RequestError(
                f"model {name!r} does not exist here; this server has {self.config.model_name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def require_room(self, num_choices: int) -> None:
        """Raise `OverloadedError` when so many sequences find no room now, `RequestError` when they never would."""
        if self.is_draining:
            raise OverloadedError("the server is shutting down; try again later")
        capacity = self.engine_loop.engine.capacity
        if num_choices > capacity:
            raise RequestError(
                f"the request asks for {num_choices} answers and this server holds {capacity} at once; "
                "send fewer prompts or a lower n",
                param="n",
            )
        self.engine_loop.engine.require_room(num_choices)


def build_app(service: Service) -> ASGIApp:
    """Build the application over `service`, whose engine loop the caller runs and stops."""
    app = Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", show_model, methods=["GET"]),
            Route("/healthz", show_health, methods=["GET"]),
            Route("/readyz", show_readiness, methods=["GET"]),
            Route("/metrics", show_metrics, methods=["GET"]),
        ],
        exception_handlers={
            DeepSeekError: answer_error,
            HTTPException: answer_http_error,
            ClientDisconnect: answer_nobody,
            Exception: answer_bug,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    allowed = "|".join(re.escape(origin).replace(r"\*", ".*") for origin in service.config.allowed_origins)
    with_origins = CORSMiddleware(
        app,
        allow_origin_regex=allowed or None,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=(_REQUEST_ID_HEADER, "Retry-After"),
    )
    return RequestLog(with_origins, service.listen)


# Endpoints


async def complete(request: Request) -> Response:
    """`POST /v1/completions`."""
    service, body = await admit(request, CompletionBody)
    service.require_room(len(body.prompts) * body.n)
    requests = await asyncio.to_thread(_completion_requests, service, body)
    echoes = await asyncio.to_thread(_echoes, service, body) if body.echo else ()
    token_bytes = service.engine_loop.engine.tokenizer.token_bytes
    is_scored = body.echo and body.logprobs is not None
    answer = CompletionAnswer(body.model, token_bytes, echoes=echoes, is_scored=is_scored)
    return await respond(request, body, requests, answer)


async def chat(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    service, body = await admit(request, ChatBody)
    service.require_room(body.n)
    async with template_place(service):
        requests = await asyncio.to_thread(_chat_requests, service, body)
    return await respond(
        request, body, requests, ChatAnswer(body.model, service.engine_loop.engine.tokenizer.token_bytes)
    )


async def list_models(request: Request) -> Response:
    """`GET /v1/models`."""
    service = authorize(request)
    return JSONResponse({"object": "list", "data": [service.card]})


async def show_model(request: Request) -> Response:
    """`GET /v1/models/{name}`."""
    service = authorize(request)
    service.require_model(request.path_params["name"])
    return JSONResponse(service.card)


async def show_health(request: Request) -> Response:
    """`GET /healthz`: 200 while the engine makes progress."""
    engine_loop = request.app.state.service.engine_loop
    status = {"status": "ok" if engine_loop.is_alive else "failed", "last_step_age_s": round(engine_loop.beat_age_s, 3)}
    return JSONResponse(status, status_code=200 if engine_loop.is_alive else 503)


async def show_readiness(request: Request) -> Response:
    """`GET /readyz`: 200 when loaded, warmed up and not shutting down."""
    service = request.app.state.service
    if service.obstacle is None:
        return JSONResponse({"status": "ready"})
    headers = {"Retry-After": str(service.config.retry_after_s)}
    return JSONResponse({"status": "not ready", "reason": service.obstacle}, status_code=503, headers=headers)


async def show_metrics(request: Request) -> Response:
    """`GET /metrics` in the Prometheus text format."""
    return Response(request.app.state.service.metrics.render(), headers={"content-type": CONTENT_TYPE})


# From request to answer


async def admit(request: Request, body: type[B]) -> tuple[Service, B]:
    """Return the service and the checked body of a request that may be served."""
    service = authorize(request)
    parsed = parse(body, await read_body(request, service.config))
    service.require_model(parsed.model)
    return service, parsed


def authorize(request: Request) -> Service:
    """Return the service, or raise `RequestError` (401) without its key; the comparison takes constant time."""
    service: Service = request.app.state.service
    if service.api_key is not None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), service.api_key.encode()):
            raise RequestError(
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
            )
    return service


@contextlib.asynccontextmanager
async def template_place(service: Service) -> AsyncIterator[None]:
    """Hold one of the places for writing a chat; raises `OverloadedError` when none gets free."""
    try:
        async with asyncio.timeout(_TEMPLATE_WAIT_S):
            await service.template_places.acquire()
    except TimeoutError:
        raise OverloadedError(f"{MAX_PROCESSES} chats are being written already; try again later") from None
    try:
        yield
    finally:
        service.template_places.release()


async def read_body(request: Request, config: ServeConfig) -> bytes:
    """Read the body; raises `RequestError` when it is too long (413), having read no further, or too slow (408)."""
    content = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for piece in request.stream():
                content += piece
                if len(content) > config.max_body_bytes:
                    message = f"the body is longer than {config.max_body_bytes} bytes; send less"
                    raise RequestError(message, status=413, code="body_too_large")
    except TimeoutError:
        message = f"the body did not arrive within {config.body_timeout_s:g} s; send it faster"
        raise RequestError(message, status=408, code="request_timeout") from None
    return bytes(content)


async def respond(
    request: Request, body: GenerationBody, requests: Sequence[GenerationRequest], answer: Answer
) -> Response:
    """Generate and answer, streamed or whole; cancels the work when the client hangs up."""
    engine_loop = request.app.state.service.engine_loop
    stream = engine_loop.open(requests)
    if body.stream:
        return EventStream(engine_loop, stream, _events(stream, body, answer))
    try:
        generations = await until_disconnect(request.receive, gather(stream))
    finally:
        engine_loop.close(stream)
    return JSONResponse(answer.whole(generations, responses.usage(stream.sequences)))


async def gather(stream: Stream) -> list[Generation]:
    """Collect the whole answers of `stream`, in the order of its requests."""
    outputs: list[list[Output]] = [[] for _ in stream.sequences]
    async for index, output in stream:
        outputs[index].append(output)
    return [collect(outputs_of_one) for outputs_of_one in outputs]


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; raises `ClientDisconnect` and cancels it when the client hangs up before."""
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


class EventStream(Response):
    """Server-sent events; closes `stream` when they are sent, and when the client hangs up before."""

    media_type = "text/event-stream"

    def __init__(self, engine_loop: EngineLoop, stream: Stream, events: AsyncIterator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._engine_loop = engine_loop
        self._stream = stream
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):  # nobody is left to answer
                await until_disconnect(receive, self._send_all(send))
        finally:
            self._engine_loop.close(self._stream)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(stream: Stream, body: GenerationBody, answer: Answer) -> AsyncIterator[bytes]:
    """Yield the events of a streamed answer; an error in the middle is an event too, since the status is long sent."""
    extra: Json = {"usage": None} if body.includes_usage else {}
    for chunk in answer.opening(len(stream.sequences)):
        yield _event(chunk | extra)
    try:
        async for index, output in stream:
            if output.error is not None:
                raise output.error
            if output.text or output.tokens or output.prompt_tokens or output.finish_reason:
                yield _event(answer.chunk(index, output) | extra)
    except RequestError as failure:
        yield _event(_error_body(failure))
        return
    if body.includes_usage:
        yield _event(answer.closing(responses.usage(stream.sequences)))
    yield b"data: [DONE]\n\n"


def _event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _disconnect(receive: Receive) -> None:
    """Return when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _completion_requests(service: Service, body: CompletionBody) -> list[GenerationRequest]:
    """Build one request per prompt and choice; without `max_tokens`, OpenAI's default or what still fits."""
    engine = service.engine_loop.engine
    requests = []
    for prompt in body.prompts:
        first = engine.request(
            prompt,
            max_tokens=body.limit,
            sampling=body.sampling,
            stop=body.stop_strings,
            ignore_eos=body.ignore_eos,
            prompt_logprobs=body.prompt_logprobs,
        )
        if body.limit is None:
            first = replace(first, max_tokens=min(first.max_tokens, DEFAULT_COMPLETION_TOKENS))
        requests += [replace(first, choice=choice) for choice in range(body.n)]
    return requests


def _chat_requests(service: Service, body: ChatBody) -> list[GenerationRequest]:
    """Build one request per choice; the template writes the special tokens, so none are added."""
    engine = service.engine_loop.engine
    prompt = render_chat(
        engine.tokenizer,
        [message.as_template_sees_it for message in body.messages],
        documents=body.documents,
        variables=body.chat_template_kwargs,
    )
    try:
        first = engine.request(
            engine.tokenizer.encode(prompt),
            max_tokens=body.limit,
            sampling=body.sampling,
            stop=body.stop_strings,
            ignore_eos=body.ignore_eos,
        )
    except RequestError as error:
        error.param = "messages" if error.param == "prompt" else error.param  # what the client calls it
        raise
    return [replace(first, choice=choice) for choice in range(body.n)]


def _echoes(service: Service, body: CompletionBody) -> tuple[str, ...]:
    """Return the prompt's text for each answer."""
    tokenizer = service.engine_loop.engine.tokenizer
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompts]
    return tuple(text for text in texts for _ in range(body.n))


# Errors


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer an error that was raised on purpose."""
    headers = {}
    body = _error_body(error)
    status = _status(error)
    if status == 503:
        headers["Retry-After"] = str(request.app.state.service.config.retry_after_s)
    if status == 500:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in {408, 413}:
        headers["Connection"] = "close"  # the rest of the body is not wanted
    return JSONResponse(body, status_code=status, headers=headers)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    message = {404: f"there is no {what} here", 405: f"{what} does not exist; this path takes another method"}
    body = responses.error(message.get(error.status_code, error.detail), status=error.status_code)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def answer_nobody(request: Request, error: Exception) -> Response:
    """Answer a client that hung up; nothing is read."""
    return Response(status_code=_CLIENT_CLOSED)


async def answer_bug(request: Request, error: Exception) -> Response:
    """Answer an error that nobody expected; its traceback is in the log, not in the answer."""
    body = responses.error(
        "the server failed on this request; its log has the reason", status=500, code="internal_error"
    )
    return JSONResponse(body, status_code=500, headers={"x-should-retry": "false"})


def _status(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    return 503 if isinstance(error, OverloadedError) else 500


def _error_body(error: Exception) -> Json:
    if isinstance(error, RequestError):
        return responses.error(str(error), status=error.status, param=error.param, code=error.code)
    code = "overloaded" if isinstance(error, OverloadedError) else "server_error"
    return responses.error(str(error), status=_status(error), code=code)


class RequestLog:
    """Gives every answer an `X-Request-Id`, the client's or a new one, and reports every request under `/v1`."""

    def __init__(self, app: ASGIApp, listen: Listener) -> None:
        self.app = app
        self._listen = listen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(_REQUEST_ID_HEADER, "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        began_s, status = time.perf_counter(), _CLIENT_CLOSED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if scope["path"].startswith("/v1/"):
                duration_s = round(time.perf_counter() - began_s, 6)
                self._listen(RequestServed(request_id, scope["method"], scope["path"], status, duration_s))
