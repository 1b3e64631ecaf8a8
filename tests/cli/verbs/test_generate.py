"""`deepseek generate`: text as it comes, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek.data.tokenizing import load_tokenizer
from deepseek.models.loading import load_model
from tests.cli.commands import Result, assert_one_sentence, deepseek, environment

Call = Callable[..., Result]


@torch.no_grad()
def continue_greedily(folder: Path, prompt: str, num_tokens: int) -> str:
    """Without a cache, an engine or a packed model."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer.encode(prompt)
    written: list[int] = []
    for _ in range(num_tokens):
        written.append(int(model(torch.tensor([ids + written]))[0, -1].argmax()))
        if written[-1] == tokenizer.eos_id:
            written.pop()
            break
    return tokenizer.decode(written)


def test_the_likeliest_continuation_is_written_after_the_prompt(call: Call, model: Path) -> None:
    result = call("generate", model, "def import ", "--max-tokens", "12")
    assert (result.status, result.err) == (0, "")
    assert result.out == "def import " + continue_greedily(model, "def import ", 12) + "\n"


def test_json_holds_the_same_text_and_the_counts(call: Call, model: Path) -> None:
    text = call("generate", model, "def ", "--max-tokens", "12").out
    result = call("generate", model, "def ", "--max-tokens", "12", "--json")
    (answer,) = result.events
    assert answer["prompt"] + answer["text"] + "\n" == text
    assert answer["num_generated"] <= 12
    assert answer["num_prompt_tokens"] == len(load_tokenizer(model).encode("def "))
    assert answer["finish_reason"] in {"length", "stop"}


def test_an_empty_prompt_is_the_beginning_of_a_document(call: Call, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    written = continue_greedily(model, tokenizer.eos_token, 12)
    assert call("generate", model, "", "--max-tokens", "12").out == written + "\n"


def test_a_long_prompt_is_continued_as_far_as_fits(call: Call, model: Path) -> None:
    prompt = "def " * 30
    (answer,) = call("generate", model, prompt, "--json").events
    assert answer["num_prompt_tokens"] + answer["num_generated"] <= 64
    assert answer["finish_reason"] == "stop" or answer["num_prompt_tokens"] + answer["num_generated"] == 64


@pytest.mark.parametrize("arguments", [[], ["-"]], ids=["left out", "dash"])
def test_a_prompt_comes_through_a_pipe(model: Path, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("def import ", encoding="utf-8")
    given = deepseek("generate", model, "def import ", "--max-tokens", "5")
    with (tmp_path / "prompt").open() as prompt:
        piped = deepseek("generate", model, *arguments, "--max-tokens", "5", stdin=prompt)
    assert (piped.status, piped.out) == (0, given.out)


def test_sampling_is_repeated_by_its_seed(call: Call, model: Path) -> None:
    options = ["--temperature", "1.5", "--max-tokens", "30", "--json"]
    texts = [call("generate", model, "def ", *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_answer_and_is_not_in_it(call: Call, model: Path) -> None:
    whole = json.loads(call("generate", model, "def ", "--max-tokens", "20", "--json").out)["text"]
    stop = whole[3:5]
    answer = json.loads(call("generate", model, "def ", "--max-tokens", "20", "--stop", stop, "--json").out)
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == whole[: whole.index(stop)]


def test_a_terminal_without_a_character_is_shown_a_question_mark(model: Path) -> None:
    there = environment() | {"PYTHONIOENCODING": "ascii"}
    result = deepseek("generate", model, "caf\u00e9", "--max-tokens", "3", env=there)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("caf?")


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("def " * 80, [], ["context", "64 tokens", "shorten the prompt"]),
        ("def ", ["--max-tokens", "64"], ["max_tokens=64", "64 tokens"]),
        ("def ", ["--max-tokens", "0"], ["max_tokens=0"]),
        ("def ", ["--temperature", "-1"], ["temperature=-1"]),
        ("def ", ["--top-p", "2"], ["top_p=2"]),
    ],
    ids=["prompt over the context", "answer over the context", "no answer", "temperature", "top_p"],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_request_that_cannot_be_served_is_one_sentence(
    call: Call, model: Path, prompt: str, options: list[str], words: list[str], as_json: bool
) -> None:
    result = call("generate", model, prompt, *options, *(["--json"] if as_json else []))
    assert_one_sentence(result, 1, *words)
    assert result.out == ""
