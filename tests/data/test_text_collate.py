"""Texts become the rows that transformers makes of them, padded to the longest of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from deepseek.data.text_collate import TextEncoder, collate_texts
from deepseek.data.tokenizing import Tokenizer, save_tokenizer, train_encoder_tokenizer

TEXTS = ["the small dog barks", "a cat", "the house by the river is old and small"]
PAIRS = ["it does, all night long by the river", "the dog", "old"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_encoder_tokenizer([*TEXTS, *PAIRS] * 9, vocab_size=70)


@pytest.fixture
def theirs(tokenizer: Tokenizer, tmp_path: Path) -> transformers.PreTrainedTokenizerFast:
    save_tokenizer(tokenizer, tmp_path)
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("max_len", [64, 8])
@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_rows_are_those_of_transformers(
    pairs: list[str] | None, max_len: int, tokenizer: Tokenizer, theirs: transformers.PreTrainedTokenizerFast
) -> None:
    batch = collate_texts(TextEncoder(tokenizer, max_len=max_len).encode(TEXTS, pairs))
    expected = theirs(
        TEXTS,
        pairs,
        padding=True,
        truncation="longest_first",
        max_length=max_len,
        return_tensors="pt",
        return_token_type_ids=True,
    )
    assert torch.equal(batch.inputs["input_ids"], expected["input_ids"])
    if pairs is not None:
        assert torch.equal(batch.inputs["token_type_ids"], expected["token_type_ids"])
    if "attention_mask" in batch.inputs:
        assert torch.equal(batch.inputs["attention_mask"], expected["attention_mask"])
    else:
        assert expected["attention_mask"].all()


def test_full_rows_need_no_mask_and_padding_is_the_tokenizers(tokenizer: Tokenizer) -> None:
    encoder = TextEncoder(tokenizer, max_len=64)
    assert set(collate_texts(encoder.encode(TEXTS[:1] * 2)).inputs) == {"input_ids"}
    batch = collate_texts(encoder.encode(TEXTS), pad_id=7)
    assert (batch.inputs["input_ids"][batch.inputs["attention_mask"] == 0] == 7).all()
    assert batch.num_rows == 3


def test_the_given_tokenizer_is_left_as_it_is(tokenizer: Tokenizer) -> None:
    before = tokenizer.digest
    TextEncoder(tokenizer, max_len=5)
    assert tokenizer.backend.truncation is None
    assert tokenizer.digest == before
