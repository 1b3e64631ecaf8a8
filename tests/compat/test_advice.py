"""Advice agrees with the documents' sentences, and is never empty."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.cli.verbs.advise import advise as run_advise
from deepseek.compat.advice import advise
from deepseek.compat.generations import find_generation, load_table
from deepseek.core.errors import ConfigError

# Each row is one sentence of the documents.
SENTENCES: list[tuple[dict[str, Any], str]] = [
    ({"gpu_memory_bytes": 6e9}, "1.0-quant"),
    ({"gpu_memory_bytes": 80e9}, "3.0"),
    ({"latency": "realtime"}, "4.0"),
    ({"latency": "realtime", "kubernetes": "none"}, "3.1"),
    ({"latency": "realtime", "hardware": "a100"}, "5.0"),
    ({"params": 7e9, "scale": "single"}, "2.3"),
    ({"params": 13e9, "scale": "single", "gpu_memory_bytes": 24e9}, "3.0"),
    ({"params": 13e9, "scale": "single"}, "3.0"),
    ({"kubernetes": "none"}, "3.1"),
    ({"kubernetes": "none", "params": 7e9, "scale": "single"}, "2.3"),
    ({"kubernetes": "none", "gpu_memory_bytes": 6e9}, "1.0-quant"),
    ({"hardware": "v100"}, "2.0"),
    ({"hardware": "v100", "latency": "batch", "kubernetes": "none"}, "2.0"),
    ({"hardware": "v100", "latency": "realtime"}, "4.0"),
    ({"hardware": "v100", "latency": "realtime", "kubernetes": "none"}, "3.1"),
    ({"hardware": "v100", "params": 20e9}, "3.0"),
    ({"params": 100e9, "hardware": "edge"}, "3.5"),
    ({"params": 99e9, "hardware": "edge"}, "2.3"),
    ({"params": 100e9, "hardware": "raspberry-pi", "gpu_memory_bytes": 4e9, "latency": "realtime"}, "3.5"),
    ({"hardware": "a100"}, "5.0"),
    ({"hardware": "h100", "latency": "batch"}, "5.0"),
    ({"hardware": "a100", "gpu_memory_bytes": 80e9}, "5.0"),
    ({"hardware": "a100", "params": 7e9, "scale": "single"}, "2.3"),
    ({"hardware": "a100", "params": 13e9}, "3.0"),
    ({"hardware": "a100", "scale": "cluster"}, "3.1"),
    ({"params": 175e9, "scale": "cluster"}, "3.5"),
    ({"scale": "cluster"}, "3.1"),
    ({"params": 20e9, "latency": "batch"}, "3.0"),
    ({"hardware": "mi300", "latency": "realtime"}, "3.1"),
    ({"hardware": "raspberry-pi", "gpu_memory_bytes": 8e9}, "2.3"),
]


@pytest.mark.parametrize(("question", "generation"), SENTENCES)
def test_advice_is_what_the_documents_say(question: dict[str, Any], generation: str) -> None:
    assert advise(**question).generation == generation


def test_a_rule_that_is_overruled_is_named_where_it_loses() -> None:
    edge = advise(params=100e9, hardware="edge")
    assert (edge.rule, "gives way" in edge.because.text) == ("hundred-billion-at-the-edge", True)
    assert "2.3" in [reason.generation for reason in edge.runners_up]
    v100 = advise(hardware="v100", latency="realtime")
    (fastest,) = (reason for reason in v100.runners_up if reason.generation == "5.0")
    assert "A100 only" in fastest.because.text


def test_no_kubernetes_experience_rules_out_the_cloud_native_generation() -> None:
    advice = advise(latency="realtime", kubernetes="none")
    assert "4.0" in [each.generation for each in advice.ruled_out]
    assert "4.0" not in [each.generation for each in advice.runners_up]


def settings() -> st.SearchStrategy[dict[str, Any]]:
    devices = [name for names in load_table().hardware.values() for name in names]
    return st.fixed_dictionaries(
        {},
        optional={
            "params": st.floats(1e6, 1e13),
            "gpu_memory_bytes": st.floats(1e8, 1e12),
            "latency": st.sampled_from(["realtime", "batch"]),
            "scale": st.sampled_from(["single", "cluster"]),
            "kubernetes": st.sampled_from(["none", "basic", "expert"]),
            "hardware": st.sampled_from(devices),
        },
    )


@given(settings())
def test_every_question_has_a_released_answer_that_nothing_rules_out(question: dict[str, Any]) -> None:
    advice = advise(**question)
    assert find_generation(advice.generation).status == "released"
    assert advice.generation not in [each.generation for each in advice.ruled_out]
    assert len({each.generation for each in advice.runners_up} | {advice.generation}) == len(advice.runners_up) + 1


@given(settings())
def test_a_named_change_really_leads_to_the_named_generation(question: dict[str, Any]) -> None:
    for change in advise(**question).changes:
        if change.setting not in ("params", "gpu_memory_bytes"):
            assert advise(**(question | {change.setting: change.value})).generation == change.generation


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"hardware": "a1000"}, r"unknown hardware 'a1000'; did you mean 'a100'"),
        ({"latency": "soon"}, "realtime"),
        ({"params": -1}, "greater than 0"),
        ({"params": float("nan")}, "finite number"),
    ],
)
def test_a_value_outside_the_question_is_refused(question: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        advise(**question)


def test_the_command_prints_the_rule_and_the_changes(capsys: pytest.CaptureFixture[str]) -> None:
    run_advise(params="7B", gpu_memory="24GB", latency="batch", scale="single")
    shown = capsys.readouterr().out
    assert "2.3" in shown
    assert "one-machine" in shown
    assert "[D0, D1]" in shown
    assert "[D1] guide to choosing and upgrading" in shown
    assert "[D2]" not in shown
    assert "Would change the answer" in shown
