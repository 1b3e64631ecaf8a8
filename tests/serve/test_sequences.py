"""The values that scheduling, sampling and the engine share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import RequestError
from deepseek.serve.sequences import (
    FinishReason,
    GenerationRequest,
    LiveSequence,
    Logprobs,
    Output,
    Sampling,
    Token,
    collect,
    fit,
)


@given(num_prompt=st.integers(1, 50), max_tokens=st.none() | st.integers(0, 50), max_length=st.integers(2, 60))
def test_what_fits_never_reaches_beyond_the_context_and_what_is_asked_for_is_given_whole(
    num_prompt: int, max_tokens: int | None, max_length: int
) -> None:
    try:
        room = fit(num_prompt, max_tokens, max_length)
    except RequestError as error:
        assert num_prompt + (1 if max_tokens is None else max_tokens) > max_length
        assert error.code == "context_length_exceeded"
        assert error.param == ("prompt" if num_prompt >= max_length else "max_tokens")
    else:
        assert num_prompt + room <= max_length
        assert room == (max_length - num_prompt if max_tokens is None else max_tokens)


def test_a_prompt_may_be_scored_without_an_answer_and_only_then() -> None:
    assert GenerationRequest((1,), max_tokens=0, prompt_logprobs=0).max_tokens == 0
    with pytest.raises(RequestError, match="max_tokens=0; choose 1 or more"):
        GenerationRequest((1,), max_tokens=0)
    with pytest.raises(RequestError, match="max_tokens=-1; choose 0 or more"):
        GenerationRequest((1,), max_tokens=-1, prompt_logprobs=0)


@pytest.mark.parametrize("changes", [{"prompt": ()}, {"stop": ("a", "")}], ids=str)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, tuple[()]]) -> None:
    with pytest.raises(RequestError):
        GenerationRequest(**{"prompt": (1,), "max_tokens": 1} | changes)  # type: ignore[arg-type]


def test_one_seed_gives_the_same_numbers_to_every_request_and_other_ones_to_each_choice() -> None:
    def numbers(seed: int | None, choice: int = 0) -> list[float]:
        request = GenerationRequest((1,), 1, Sampling(seed=seed), choice=choice)
        sequence = LiveSequence(request)
        return [sequence.random.random() for _ in range(3)]

    assert numbers(5) == numbers(5)
    assert numbers(5) != numbers(6)
    assert numbers(5) != numbers(5, choice=1)
    assert numbers(None) != numbers(None)


def test_the_newest_token_is_not_in_the_cache_yet() -> None:
    sequence = LiveSequence(GenerationRequest((1, 2, 3), 4))
    counts = [sequence.num_cached]
    sequence.num_read = 3
    for token in (7, 8):
        counts.append(sequence.num_cached)
        sequence.tokens.append(token)
    assert [*counts, sequence.num_cached] == [0, 3, 3, 4]


def test_outputs_are_joined_in_their_order() -> None:
    request = GenerationRequest((1, 2), 3, prompt_logprobs=0)
    scored = (Token(1, 0), Token(2, 1, Logprobs(-0.5, ())))
    outputs = [
        Output(0, request, prompt_tokens=scored),
        Output(0, request, text="a", tokens=(Token(5, 0),), num_generated=1),
        Output(
            0, request, text="bc", tokens=(Token(6, 1), Token(7, 2)), num_generated=3, finish_reason=FinishReason.LENGTH
        ),
    ]
    generation = collect(outputs)
    assert (generation.text, [token.id for token in generation.tokens]) == ("abc", [5, 6, 7])
    assert (generation.num_prompt_tokens, generation.num_generated) == (2, 3)
    assert generation.prompt_tokens == scored
    with pytest.raises(RequestError, match="not finished"):
        collect(outputs[:2])


def test_the_error_that_ended_a_sequence_is_raised() -> None:
    error = RequestError("no numbers", status=500)
    request = GenerationRequest((1,), 3)
    with pytest.raises(RequestError, match="no numbers"):
        collect([Output(0, request, text="a"), Output(0, request, finish_reason=FinishReason.ERROR, error=error)])
