"""`deepseek advise`: what the documents' rules say, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from deepseek.compat.advice import Advice, advise
from tests.cli.commands import Result, assert_one_sentence

Call = Callable[..., Result]
QUESTION = ("advise", "--latency", "realtime", "--kubernetes", "none")


def squeeze(text: str) -> str:
    """A table without its frame and spaces."""
    return "".join(text.translate(dict.fromkeys(map(ord, "│┃┏┓┗┛━─┌┐└┘├┤┬┴┼╇┡┩┳"))).split())


def test_json_is_what_the_function_advises(call: Call) -> None:
    result = call(*QUESTION, "--params", "7B", "--gpu-memory", "24GB", "--json")
    expected = advise(params=7e9, gpu_memory_bytes=24e9, latency="realtime", kubernetes="none")
    assert Advice.from_dict(json.loads(result.out)) == expected


def test_text_says_the_answer_its_rule_and_everything_that_lost(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = call(*QUESTION)
    advice = advise(latency="realtime", kubernetes="none")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"Generation {advice.generation}, by rule {advice.rule}: {advice.because}\n")
    assert advice.runners_up and advice.ruled_out and advice.changes
    shown = squeeze(result.out)
    for reason in (*advice.runners_up, *advice.ruled_out):
        assert squeeze(f"{reason.generation}{reason.because}") in shown
    for change in advice.changes:
        assert squeeze(f"{change.setting}: {change.value} -> {change.generation}") in shown


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [("24", 24e9), ("7.5", 7.5e9), (" 80 ", 80e9), ("24gb", 24e9), ("16GiB", 2**34), ("8e9", 8e9)],
)
def test_a_bare_number_of_memory_counts_gigabytes(call: Call, written: str, num_bytes: float) -> None:
    result = call("advise", "--gpu-memory", written, "--json")
    assert Advice.from_dict(json.loads(result.out)).question.gpu_memory_bytes == num_bytes


def test_help_says_what_a_generation_is_and_names_the_documents(call: Call) -> None:
    for verb in ("advise", "migrate", "benchmark", "check-compatibility"):
        shown = " ".join(call(verb, "--help").out.split())
        assert "engine that this product was built from" in shown, verb
    assert "[D2] the release notes of 3.1" in " ".join(call("advise", "--help").out.split())


def test_a_table_without_rows_is_not_shown(call: Call) -> None:
    advice, out = advise(params=7e9, scale="single"), call("advise", "--params", "7e9", "--scale", "single").out
    assert not advice.ruled_out
    assert "Ruled out" not in out
    assert "Would change the answer" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--params", "seven"), ("'seven'", "1.2M")),
        (("--gpu-memory", "24GX"), ("'24GX'",)),
        (("--gpu-memory", "24B"), ("24 B", "24GB")),
        (("--gpu-memory", "0"), ("0 B", "24GB")),
        (("--gpu-memory", "24PB"), ("24.0 PB", "24GB")),
        (("--gpu-memory", ""), ("''", "24GB")),
        (("--gpu-memory", "nan"), ("'nan'", "24GB")),
        (("--params", "7"), ("7 parameters", "7B")),
        (("--hardware", "a10O"), ("unknown hardware", "a100")),
        (("--latency", "soon"), ("latency", "soon")),
    ],
)
def test_a_value_that_is_none_is_one_sentence(call: Call, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_sentence(call("advise", *options), 2, *words)
