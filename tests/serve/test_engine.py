"""The engine against greedy decoding without a cache, one whole forward pass for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from deepseek.core.errors import ConfigError, OverloadedError, PermanentError, RequestError
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import make_int8_
from deepseek.nn.packed import pack_
from deepseek.serve.config import EngineConfig
from deepseek.serve.engine import Engine
from deepseek.serve.sequences import FinishReason, LiveSequence, Output, Sampling, collect

Make = Callable[..., Any]
MAX_LENGTH = 96
PROMPTS = ["def ", "class Größe", "import os, sys  # 漢字 und Wörter\n" * 2, "x", "return left"]


def decode_by_hand(model: Decoder, tokenizer: Tokenizer, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + max_tokens and tokenizer.eos_id not in tokens[len(prompt) :]:
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prefill_tokens", [3, 256])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 8])
def test_greedy_answers_in_a_batch_are_those_of_plain_decoding(
    model: Decoder, tokenizer: Tokenizer, max_num_seqs: int, prefill_tokens: int
) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=max_num_seqs, prefill_tokens=prefill_tokens))
    lengths = [20, 7, 12, 30, 1]
    requests = [engine.request(prompt, max_tokens=n) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    sequences = [LiveSequence(request) for request in requests]
    engine.submit(sequences)
    texts = [""] * len(sequences)
    while engine.has_work:
        for output in engine.step():
            texts[[each.id for each in sequences].index(output.sequence_id)] += output.text
    for sequence, text, prompt in zip(sequences, texts, PROMPTS, strict=True):
        expected = decode_by_hand(model, tokenizer, tokenizer.encode(prompt), sequence.request.max_tokens)
        assert sequence.tokens == expected
        assert text == tokenizer.decode(expected)


def test_requests_that_come_and_go_leave_the_others_as_they_would_be_alone(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=3, prefill_tokens=4))
    sequences = [LiveSequence(engine.request(prompt, max_tokens=15)) for prompt in PROMPTS * 2]
    unsent = list(sequences)
    for step in range(400):
        if unsent and step % 3 == 0:
            engine.submit([unsent.pop(0)])
        if step in {5, 9, 20}:
            engine.cancel(sequences[step // 4])
        engine.step()
    assert not engine.has_work
    for sequence in sequences:
        whole = decode_by_hand(model, tokenizer, list(sequence.request.prompt), 15)
        if sequence.is_cancelled:
            assert sequence.finish_reason is FinishReason.CANCELLED
            assert sequence.tokens == whole[: len(sequence.tokens)]
        else:
            assert sequence.tokens == whole


def test_generate_answers_in_the_order_of_the_prompts_and_beyond_the_queue(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=2, max_queue=1))
    answers = engine.generate(PROMPTS * 2, max_tokens=6)
    for prompt, answer in zip(PROMPTS * 2, answers, strict=True):
        expected = decode_by_hand(model, tokenizer, tokenizer.encode(prompt), 6)
        assert answer.text == tokenizer.decode(expected)
        assert answer.num_generated == len(expected)
        assert answer.num_prompt_tokens == len(tokenizer.encode(prompt))


def test_the_end_of_text_token_ends_an_answer_and_is_not_in_it(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(Scripted)
    engine = Engine(model, tokenizer)
    model.script = [*tokenizer.encode("abc"), tokenizer.eos_id, *tokenizer.encode("def")]
    answer = engine.generate(["x"], max_tokens=20)[0]
    assert (answer.text, answer.finish_reason) == ("abc", FinishReason.STOP)
    assert answer.num_generated == len(tokenizer.encode("abc")) + 1
    longer = engine.generate(["x"], max_tokens=len(model.script), ignore_eos=True)[0]
    assert longer.finish_reason is FinishReason.LENGTH
    assert longer.num_generated == len(model.script)


@pytest.mark.parametrize("stop", [["b 漢"], ["漢", "zz"], ["b 漢字 c"]])
def test_a_stop_string_over_several_tokens_cuts_the_answer(
    make_model: Make, tokenizer: Tokenizer, stop: list[str]
) -> None:
    model = make_model(Scripted)
    model.script = tokenizer.encode("a b 漢字 c d e f")
    engine = Engine(model, tokenizer)
    answer = engine.generate(["x"], max_tokens=len(model.script), stop=stop)[0]
    assert answer.finish_reason is FinishReason.STOP
    assert answer.text == "a b 漢字 c d e f".partition(stop[0])[0]


def test_one_seed_gives_one_answer_in_any_company_and_several_choices_differ(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=4))
    sampling = Sampling(temperature=1.5, top_p=0.99, seed=7)
    alone = engine.generate(["def "], max_tokens=20, sampling=sampling)[0].tokens
    again = engine.generate(["x", "def ", "class"], max_tokens=20, sampling=sampling)[1].tokens
    assert [token.id for token in alone] == [token.id for token in again]
    choices = [engine.request("def ", max_tokens=20, sampling=sampling, choice=choice) for choice in range(3)]
    answers: dict[int, str] = {}
    for index, output in engine.run(choices):
        answers[index] = answers.get(index, "") + output.text
    assert len(set(answers.values())) == 3
    other = engine.generate(["def "], max_tokens=20, sampling=Sampling(temperature=1.5, top_p=0.99, seed=8))[0].tokens
    assert [token.id for token in alone] != [token.id for token in other]


def test_log_probabilities_are_those_of_a_whole_forward_pass(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    answer = engine.generate(["def "], max_tokens=5, sampling=Sampling(temperature=0, num_logprobs=3))[0]
    prompt = tokenizer.encode("def ")
    with torch.no_grad():
        whole = torch.tensor([[*prompt, *(token.id for token in answer.tokens)]])
        expected_TV = torch.log_softmax(model(whole)[0].double(), -1)
    for position, token in enumerate(answer.tokens, start=len(prompt) - 1):
        assert token.logprobs is not None
        assert token.logprobs.chosen == pytest.approx(float(expected_TV[position, token.id]), abs=1e-4)
        assert [each for each, _ in token.logprobs.top] == expected_TV[position].topk(3).indices.tolist()


def test_a_cancelled_sequence_frees_its_place_wherever_it_is(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=2, prefill_tokens=2, max_queue=5))
    decoding, reading, waiting = (LiveSequence(engine.request([5] * length, max_tokens=30)) for length in (2, 40, 3))
    engine.submit([decoding, reading, waiting])
    for _ in range(3):
        engine.step()
    assert (decoding.is_read, reading.is_read, engine.num_waiting) == (True, False, 1)
    for sequence in (waiting, reading, decoding):
        engine.cancel(sequence)
    outputs = engine.step()
    assert {output.finish_reason for output in outputs} == {FinishReason.CANCELLED}
    assert len(outputs) == 3
    assert not engine.has_work
    assert engine.cache_usage == 0


def test_a_caller_who_stops_reading_leaves_nothing_behind(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    run = engine.run([engine.request("def ", max_tokens=50)])
    next(run)
    run.close()
    engine.step()
    assert not engine.has_work


def test_outputs_tell_counts_and_times(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    outputs: list[Output] = [
        output for _, output in engine.run([engine.request("def ", max_tokens=4, ignore_eos=True)])
    ]
    assert [output.num_generated for output in outputs] == [1, 2, 3, 4]
    assert [output.is_first for output in outputs] == [True, False, False, False]
    spans = [output.token_s for output in outputs]
    assert all(span is not None and span >= 0 for span in spans)
    assert sum(span or 0 for span in spans) == pytest.approx(outputs[-1].elapsed_s)
    assert 0 <= outputs[0].queued_s <= outputs[0].elapsed_s


def test_cache_usage_counts_the_positions_in_use(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=2, max_length=50))
    engine.submit([LiveSequence(engine.request([1] * 10, max_tokens=5, ignore_eos=True))])
    engine.step()
    assert engine.cache_usage == 10 / 100
    engine.step()
    assert engine.cache_usage == 11 / 100


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 1, "no tokens"),
        ([1] * MAX_LENGTH, None, f"{MAX_LENGTH} tokens"),
        ([1] * 90, 7, "max_tokens=7"),
        ([1, 10**6], 1, "outside 0 to"),
        ([-1], 1, "outside 0 to"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused(
    model: Decoder, tokenizer: Tokenizer, prompt: str | list[int], max_tokens: int | None, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        Engine(model, tokenizer).request(prompt, max_tokens=max_tokens)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"max_tokens": -1}, {"stop": [""]}, {"stop": ["a", ""]}], ids=str
)
def test_options_that_make_no_sense_are_refused(model: Decoder, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Engine(model, tokenizer).request("x", **options)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_k": -1}], ids=str
)
def test_sampling_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(settings))):
        Sampling(**settings)


def test_a_full_context_is_generated_to_its_last_position(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    answer = engine.generate([[1] * 90], ignore_eos=True)[0]
    assert answer.num_generated == MAX_LENGTH - 90


def test_a_queue_that_is_full_refuses(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=1, max_queue=0))
    engine.submit([LiveSequence(engine.request("x", max_tokens=1))])
    with pytest.raises(OverloadedError):
        engine.submit([LiveSequence(engine.request("x", max_tokens=1))])


def test_a_length_beyond_the_model_and_a_foreign_tokenizer_are_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="made for 96"):
        Engine(model, tokenizer, EngineConfig(max_length=97))
    small = Decoder(model.config.override({"vocab_size": 10}))
    with pytest.raises(ConfigError, match="the model 10"):
        Engine(small, tokenizer)


def test_a_cache_that_does_not_fit_into_memory_is_one_sentence(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs=1000000000000 of max_length=96 tokens does not fit"):
        Engine(model, tokenizer, EngineConfig(max_num_seqs=10**12))


def test_a_context_that_memory_does_not_hold_is_cut_and_one_that_is_asked_for_is_not(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"vocab_size": tokenizer.vocab_size, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_length": 5000}
    model = Decoder(DecoderConfig(**shape))  # type: ignore[arg-type]
    position_bytes = 2 * 2 * 32 * 4 * 3  # keys and values of two layers, for three sequences
    for free, expected in ((10**12, 5000), (2 * 1000 * position_bytes, 960), (1, 512)):
        monkeypatch.setattr("deepseek.serve.engine.measure_free_bytes", lambda free=free: free)
        assert Engine(model, tokenizer, EngineConfig(max_num_seqs=3)).max_length == expected
    assert Engine(model, tokenizer, EngineConfig(max_num_seqs=3, max_length=4000)).max_length == 4000


def test_a_model_that_returns_no_numbers_is_found_in_the_warm_up(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(PermanentError, match="finite"):
        Engine(model, tokenizer).warm_up()


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(temperature=1.0, seed=5)], ids=["greedy", "seed"]
)
def test_an_answer_does_not_depend_on_its_company(
    make_model: Make, tokenizer: Tokenizer, kind: str, sampling: Sampling
) -> None:
    """Prompts on both sides of a block of keys, and some that are read in several chunks."""
    model = make_model()
    model = pack_(make_int8_(model) if kind == "int8" else model)
    prompts = [[(7 * i + j) % 250 + 1 for j in range(length)] for i, length in enumerate((3, 17, 40, 58, 63, 70))]
    config = EngineConfig(max_num_seqs=6, prefill_tokens=16)
    together = Engine(model, tokenizer, config).generate(prompts, max_tokens=20, sampling=sampling, ignore_eos=True)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = Engine(model, tokenizer, EngineConfig(max_num_seqs=1, prefill_tokens=16))
        (expected,) = alone.generate([prompt], max_tokens=20, sampling=sampling, ignore_eos=True)
        assert [token.id for token in answer.tokens] == [token.id for token in expected.tokens]


def test_every_end_token_of_the_model_ends_an_answer(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(Scripted)
    other_end = tokenizer.backend.token_to_id("<|im_end|>")
    model.script = [*tokenizer.encode("abc"), other_end, *tokenizer.encode("def")]
    chat = replace(tokenizer, other_end_ids=(other_end,))
    assert Engine(model, chat).generate(["x"], max_tokens=20)[0].text == "abc"
    plain = Engine(model, tokenizer).generate(["x"], max_tokens=len(model.script))[0]
    assert (plain.text, plain.finish_reason) == ("abcdef", FinishReason.LENGTH)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_special_token_among_the_stop_strings_stops(make_model: Make, tokenizer: Tokenizer, ignore_eos: bool) -> None:
    model = make_model(Scripted)
    model.script = [*tokenizer.encode("abc"), tokenizer.backend.token_to_id("<|im_end|>"), *tokenizer.encode("def")]
    engine = Engine(model, tokenizer)
    answer = engine.generate(["x"], max_tokens=20, stop=["zz", "<|im_end|>"], ignore_eos=ignore_eos)[0]
    assert (answer.text, answer.finish_reason) == ("abc", FinishReason.STOP)


def test_tokens_that_were_added_beyond_the_models_rows_are_no_obstacle(model: Decoder, tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<pad>"])
    padded = Tokenizer(backend, tokenizer.eos_token)
    engine = Engine(model, padded)
    assert (
        engine.generate(["def "], max_tokens=6)[0].text
        == Engine(model, tokenizer).generate(["def "], max_tokens=6)[0].text
    )
    with pytest.raises(RequestError, match="outside 0 to"):
        engine.request("a<pad>b")


def test_a_model_that_fails_in_a_batch_ends_only_the_sequence_at_fault(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(Allergic)
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=3))
    expected = Engine(make_model(), tokenizer).generate(["def ", "class"], max_tokens=12, ignore_eos=True)
    requests = [engine.request(prompt, max_tokens=12, ignore_eos=True) for prompt in ("def ", "x", "class")]
    sequences = [LiveSequence(request) for request in requests]
    engine.submit(sequences)
    outputs: dict[int, list[Output]] = {sequence.id: [] for sequence in sequences}
    for step in range(60):
        if step == 4:
            model.poison = sequences[1].tokens[-1]
            model.poisoned_position = sequences[1].num_cached
        for output in engine.step():
            outputs[output.sequence_id].append(output)
    assert not engine.has_work
    first, failed, last = (outputs[sequence.id] for sequence in sequences)
    assert [collect(first).text, collect(last).text] == [generation.text for generation in expected]
    assert failed[-1].finish_reason is FinishReason.ERROR
    with pytest.raises(RequestError, match="the model failed on this request") as raised:
        collect(failed)
    assert raised.value.status == 500


def test_a_text_that_cannot_be_decoded_ends_only_its_sequence(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=2))
    sequences = [LiveSequence(engine.request(prompt, max_tokens=8, ignore_eos=True)) for prompt in ("def ", "class")]
    engine.submit(sequences)

    def fail(*args: object) -> None:
        raise Exception("Invalid prefix encountered")

    monkeypatch.setattr(engine._writers[sequences[0].id], "push", fail)
    outputs = [output for _ in range(12) for output in engine.step()]
    ends = {output.sequence_id: output.finish_reason for output in outputs if output.finish_reason}
    assert ends == {sequences[0].id: FinishReason.ERROR, sequences[1].id: FinishReason.LENGTH}


@given(ids=st.lists(st.integers(3, 258), max_size=12))
@settings(deadline=None, max_examples=40)
def test_any_bytes_of_a_byte_fallback_tokenizer_are_generated_and_come_out_as_text(ids: list[int]) -> None:
    """Token numbers 3 to 258 are single bytes, of which most sequences are no UTF-8."""
    fallback = byte_fallback_tokenizer()
    config = DecoderConfig(vocab_size=fallback.vocab_size, num_layers=1, hidden_size=8, num_heads=1, max_length=32)
    model = Scripted(config)
    model.script = [*ids, fallback.eos_id]
    answer = Engine(model, fallback).generate([[fallback.bos_id or 0]], max_tokens=20)[0]
    assert answer.finish_reason is FinishReason.STOP
    content = bytes(number - 3 for number in ids)
    try:
        assert answer.text == content.decode().removeprefix(" ")
    except UnicodeDecodeError:
        assert "\N{REPLACEMENT CHARACTER}" in answer.text


def test_a_prompt_that_ends_inside_a_character_is_not_repeated(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(Scripted)
    model.script = tokenizer.encode("abc")
    prompt = tokenizer.encode("prompt 🎉")[:-1]
    assert Engine(model, tokenizer).generate([prompt], max_tokens=len(model.script))[0].text == "abc"


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 and Gemma have it: what is not in the vocabulary is spelled in byte tokens."""
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "»", "▁a"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, eos_token="</s>", bos_token="<s>")


class Allergic(Decoder):
    """A decoder that fails on a whole batch in which one token is at one position."""

    poison, poisoned_position = -1, -1

    def forward(self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, **keywords: Any) -> Tensor:
        if positions_BT is not None and ((tokens_BT == self.poison) & (positions_BT == self.poisoned_position)).any():
            raise RuntimeError("index out of range")
        return super().forward(tokens_BT, positions_BT=positions_BT, **keywords)


class Scripted(Decoder):
    """A decoder that says the tokens of `script`, one after the other, whatever it is asked."""

    script: list[int]

    def forward(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, cache: object = None, last_only: bool = False
    ) -> Tensor:
        assert positions_BT is not None
        if tokens_BT.shape[1] > 1 or int(positions_BT[0, -1]) == 0:
            self._start = int(positions_BT[0, -1])
        logits_11V = torch.zeros(1, 1, self.config.vocab_size)
        logits_11V[0, 0, self.script[int(positions_BT[0, -1]) - self._start]] = 1.0
        return logits_11V


def test_a_scored_prompt_whose_logits_are_no_numbers_is_its_own_error(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    engine = Engine(model, tokenizer)
    requests = [engine.request(prompt, max_tokens=0, prompt_logprobs=1) for prompt in ([7, 3, 4], [5, 3, 4])]
    ends = {index: output for index, output in engine.run(requests) if output.finish_reason is not None}
    assert ends[0].finish_reason is FinishReason.ERROR
    assert "not finite" in str(ends[0].error)
    assert (ends[1].finish_reason, ends[1].error, len(ends[1].prompt_tokens)) == (FinishReason.LENGTH, None, 3)
