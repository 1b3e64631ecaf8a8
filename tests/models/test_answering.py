"""Answers are those of a plain search over the scores of transformers, also where a text is cut into windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from deepseek.core.errors import ConfigError
from deepseek.data.tokenizing import save_tokenizer, train_encoder_tokenizer
from deepseek.models.loading import load_model, save_model
from deepseek.models.transformers_models.model import build_transformers

CONTEXT = "the old house by the river has a small garden where a dog sleeps all day and a cat waits for the night"
QUESTION = "who sleeps all day"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_encoder_tokenizer([CONTEXT, QUESTION] * 3, vocab_size=70)
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    values = {"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "vocab_size": tokenizer.vocab_size}
    model = build_transformers(values | shape | {"max_position_embeddings": 64, "initializer_range": 0.4})
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    return tmp_path


def test_the_answer_is_that_of_a_plain_search(folder: Path) -> None:
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    context = CONTEXT[:60]
    encoded = tokenizer(QUESTION, context, return_tensors="pt", return_offsets_mapping=True, return_token_type_ids=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        scores = theirs(**encoded)
    places = [place for place, sequence in enumerate(encoded.sequence_ids()) if sequence == 1]
    pairs = [(first, last) for first in places for last in places if first <= last < first + 30]
    starts, ends = scores.start_logits[0], scores.end_logits[0]
    first, last = max(pairs, key=lambda pair: float(starts[pair[0]] + ends[pair[1]]))
    found = load_model(folder / "model").answer(QUESTION, context)
    assert (found.begin, found.end) == (offsets[first][0], offsets[last][1])
    assert found.text == context[found.begin : found.end]
    expected = float(starts[first] + ends[last] - starts[0] - ends[0])
    assert found.score == pytest.approx(expected, abs=1e-4)


def test_an_answer_far_behind_is_found_in_its_window(folder: Path) -> None:
    found = load_model(folder / "model").answer(QUESTION, " ".join([CONTEXT] * 20))
    assert 0 <= found.begin < found.end <= 20 * (len(CONTEXT) + 1)


def test_another_model_and_empty_texts_are_refused(folder: Path) -> None:
    model = load_model(folder / "model")
    with pytest.raises(ConfigError, match="the question is empty"):
        model.answer(" ", CONTEXT)
    with pytest.raises(ConfigError, match="the context is empty"):
        model.answer(QUESTION, "")
    with pytest.raises(ConfigError, match="finds answers in texts; call answer"):
        model.classify(QUESTION)
    values = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 24, "num_attention_heads": 2}
    save_model(build_transformers(values | {"num_hidden_layers": 1}), folder / "other")
    with pytest.raises(ConfigError, match="answers no questions"):
        load_model(folder / "other").answer(QUESTION, CONTEXT)
