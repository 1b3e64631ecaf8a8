"""Metrics fed with outputs that were made by hand; what a running server counts is in test_app.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from prometheus_client.parser import text_string_to_metric_families

from deepseek.serve.metrics import Metrics
from deepseek.serve.sequences import FinishReason, GenerationRequest, Output

REQUEST = GenerationRequest((1, 2, 3), 4)


def read(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            if "le" not in sample.labels and not sample.name.endswith("_created"):
                found[sample.name + sample.labels.get("finished_reason", "")] = sample.value
    return found


def step(num_generated: int, token_s: float, reason: FinishReason | None = None) -> Output:
    return Output(
        0,
        REQUEST,
        num_generated=num_generated,
        is_first=num_generated == 1,
        queued_s=0.5,
        elapsed_s=token_s * num_generated,
        token_s=token_s,
        finish_reason=reason,
    )


def test_tokens_and_times_are_counted_where_they_belong() -> None:
    metrics = Metrics("tiny")
    metrics.observe([step(1, 2.0)])
    metrics.observe([step(2, 0.25), step(3, 0.25, FinishReason.STOP)])
    found = read(metrics)
    assert found["ds_prompt_tokens_total"] == 3
    assert found["ds_generation_tokens_total"] == 3
    assert found["ds_time_to_first_token_seconds_sum"] == 2.0
    assert (found["ds_inter_token_latency_seconds_count"], found["ds_inter_token_latency_seconds_sum"]) == (2, 0.5)
    assert (found["ds_request_queue_time_seconds_count"], found["ds_request_queue_time_seconds_sum"]) == (1, 0.5)
    assert found["ds_e2e_request_latency_seconds_sum"] == 0.75
    assert found["ds_request_success_totalstop"] == 1


def test_every_reason_to_end_has_a_series_from_the_start() -> None:
    metrics = Metrics("tiny")
    assert {name: read(metrics)[f"ds_request_success_total{name}"] for name in FinishReason} == dict.fromkeys(
        FinishReason, 0
    )
    metrics.observe([Output(0, REQUEST, finish_reason=FinishReason.ERROR)])
    assert read(metrics)["ds_request_success_totalerror"] == 1
    assert read(metrics)["ds_prompt_tokens_total"] == 0


def test_gauges_ask_the_engine_each_time_they_are_read() -> None:
    engine = SimpleNamespace(num_running=1, num_waiting=2, cache_usage=0.25)
    metrics = Metrics("tiny")
    metrics.watch(cast("Any", engine))
    assert [read(metrics)[f"ds_num_requests_{state}"] for state in ("running", "waiting")] == [1, 2]
    engine.num_running, engine.cache_usage = 5, 0.75
    assert (read(metrics)["ds_num_requests_running"], read(metrics)["ds_kv_cache_usage_perc"]) == (5, 0.75)


def test_two_servers_in_one_process_do_not_share_their_counts() -> None:
    first, second = Metrics("tiny"), Metrics("tiny")
    first.observe([step(1, 1.0)])
    assert read(second)["ds_generation_tokens_total"] == 0
