"""Decoding from recordings gives the answers of decoding as it is, on a stand-in for a GPU that records."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.core.errors import ConfigError
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.decoder.model import Decoder
from deepseek.serve.config import EngineConfig
from deepseek.serve.engine import Engine
from deepseek.serve.sequences import Sampling
from tests.compiler.runtimes.recorder import Recorder

Make = Callable[..., Any]
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
# Lengths over several key blocks, and more prompts than slots, so that some are read while others are decoded.
PROMPTS = [[5 + (3 * index + token) % 200 for token in range(length)] for index, length in enumerate((1, 60, 7, 80, 3))]


@pytest.mark.parametrize("kind", ["greedy", "drawn"])
@pytest.mark.parametrize(("max_num_seqs", "prefill_tokens"), [*product((1, 3, 6), (4, 256))])
def test_recorded_answers_are_those_without_recordings(
    model: Decoder, tokenizer: Tokenizer, max_num_seqs: int, prefill_tokens: int, kind: str
) -> None:
    sampling = Sampling(temperature=0) if kind == "greedy" else Sampling(seed=3)
    settings = {"max_num_seqs": max_num_seqs, "prefill_tokens": prefill_tokens}
    answers = []
    recorder = Recorder()
    for switch, record in (("off", None), ("on", recorder)):
        engine = Engine(model, tokenizer, EngineConfig(**settings, cuda_graphs=switch), record=record)
        engine.warm_up()
        generations = engine.generate(PROMPTS, max_tokens=14, sampling=sampling, ignore_eos=True)
        answers.append([(answer.text, [token.id for token in answer.tokens]) for answer in generations])
    assert answers[0] == answers[1]
    num_lengths = 2  # of one and of two key blocks
    assert 1 <= recorder.num_recorded <= num_lengths * max_num_seqs.bit_length() + num_lengths


def test_a_prompt_that_fills_the_context_stays_as_it_was_beside_a_recorded_step(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    config = EngineConfig(max_num_seqs=4, prefill_tokens=16, cuda_graphs="on")
    full = PROMPTS[3] + [9] * (model.config.max_length - len(PROMPTS[3]))
    scores = []
    for engine in (Engine(model, tokenizer, EngineConfig()), Engine(model, tokenizer, config, record=Recorder())):
        beside = [engine.request(prompt, max_tokens=12, ignore_eos=True) for prompt in PROMPTS[:3]]
        scored = engine.request(full, max_tokens=0, prompt_logprobs=0)
        outputs = [output for index, output in engine.run([*beside, scored]) if index == 3]
        scores.append([token.logprobs.chosen for token in outputs[-1].prompt_tokens if token.logprobs])
    assert len(scores[0]) == len(full) - 1
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_a_model_that_cannot_be_recorded_says_so_once_and_answers(
    model: Decoder, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> tuple[Tensor, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing\nwith a stack")

    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=3, cuda_graphs="on"), record=refuse)
    answers = engine.generate(PROMPTS, max_tokens=5)
    assert answers == Engine(model, tokenizer, EngineConfig(max_num_seqs=3)).generate(PROMPTS, max_tokens=5)
    assert caplog.messages == [
        "decoding runs without CUDA graphs, since this model could not be recorded "
        "(RuntimeError: operation not permitted when stream is capturing)"
    ]


def test_a_sequence_that_fails_in_a_recorded_batch_ends_alone(make_model: Make, tokenizer: Tokenizer) -> None:
    class Fragile(Decoder):
        """Cannot bear token 77 among what it decodes."""

        def forward(self, tokens_BT: Tensor, **keywords: Any) -> Tensor:
            if tokens_BT.shape[1] == 1 and bool((tokens_BT == 77).any()):
                raise ValueError("no 77")
            return super().forward(tokens_BT, **keywords)

    engine = Engine(make_model(Fragile), tokenizer, EngineConfig(max_num_seqs=3, cuda_graphs="on"), record=Recorder())
    good = engine.request(PROMPTS[0], max_tokens=4, ignore_eos=True)
    last = dict(engine.run([good, engine.request([5, 6], max_tokens=2)]))
    assert last[0].error is None
    assert engine.num_running == 0


@needs_none
def test_recordings_that_are_asked_for_without_cuda_are_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        Engine(model, tokenizer, EngineConfig(cuda_graphs="on"))
