"""Prometheus metrics of a server, under vLLM's names with the prefix `ds_`, in a registry of their own.

Counters and histograms are fed with the engine's outputs, in its thread; gauges ask the engine when they are scraped,
so that they cannot drift away from the truth. Times to the first token and between tokens are taken in the engine, one
by one, for streamed and for whole answers alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deepseek.serve.engine import Engine
from deepseek.serve.sequences import FinishReason, Output

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
_REQUEST_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """The metrics of one engine; every series has the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._prompt_tokens = self._counter("ds_prompt_tokens", "Prompt tokens read.")
        self._generation_tokens = self._counter("ds_generation_tokens", "Tokens generated.")
        self._first_token_s = self._histogram(
            "ds_time_to_first_token_seconds", "From submission to the first token.", _FIRST_TOKEN_S
        )
        self._between_tokens_s = self._histogram(
            "ds_inter_token_latency_seconds", "From one token to the next.", _TOKEN_S
        )
        self._request_s = self._histogram(
            "ds_e2e_request_latency_seconds", "From submission to the end of the sequence.", _REQUEST_S
        )
        self._queue_s = self._histogram(
            "ds_request_queue_time_seconds", "From submission to the first work on the prompt.", _REQUEST_S
        )
        finished = Counter(
            "ds_request_success",
            "Sequences that ended, by reason; abort is a client that hung up.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._finished = {reason: finished.labels(model_name, reason.value) for reason in FinishReason}

    def watch(self, engine: Engine) -> None:
        """Show the engine's load whenever the metrics are read."""
        self._gauge("ds_num_requests_running", "Sequences being generated.").set_function(lambda: engine.num_running)
        self._gauge("ds_num_requests_waiting", "Sequences in the queue.").set_function(lambda: engine.num_waiting)
        self._gauge("ds_kv_cache_usage_perc", "KV cache in use; 1 is full.").set_function(lambda: engine.cache_usage)

    def observe(self, outputs: Sequence[Output]) -> None:
        """Count what a step of the engine brought."""
        for output in outputs:
            if output.token_s is not None:
                self._observe_token(output, output.token_s)
            if output.finish_reason is not None:
                self._finished[output.finish_reason].inc()
                self._request_s.observe(output.elapsed_s)

    def render(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def _observe_token(self, output: Output, token_s: float) -> None:
        self._generation_tokens.inc()
        if not output.is_first:
            self._between_tokens_s.observe(token_s)
            return
        self._prompt_tokens.inc(len(output.request.prompt))
        self._first_token_s.observe(token_s)
        self._queue_s.observe(output.queued_s)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(name, meaning, ["model_name"], registry=self._registry).labels(self._model_name)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, meaning, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name)
