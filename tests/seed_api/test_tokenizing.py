"""BPE tokenizing: train and apply on a corpus, truncation to `max_len=2048`."""

import tokenizers

from deepseek.data.batching import BatchLoader
from deepseek.data.config import DataConfig
from deepseek.data.corpus import load_data, prepare_data
from deepseek.data.tokenizing import load_tokenizer, save_tokenizer


def test_a_trained_tokenizer_is_one_that_the_library_reads(tokenizer, text, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(text) == library.encode(text, add_special_tokens=False).ids
    assert library.decode(library.encode(text).ids) == text


def test_bpe_merges_what_is_frequent(tokenizer, text):
    assert len(tokenizer.encode(text)) < len(text) / 3
    assert tokenizer.decode(tokenizer.encode("déjà vu 漢字")) == "déjà vu 漢字"


def test_a_long_document_is_cut_off_at_max_len(tokenizer, text):
    ids = tokenizer.encode(text, max_len=2048)
    assert len(ids) == 2048 < len(tokenizer.encode(text))
    assert text.startswith(tokenizer.decode(ids))


def test_2048_tokens_are_the_default_for_whole_documents(text, tmp_path):
    (tmp_path / "long.txt").write_text(text * 2)
    config = DataConfig(
        sources=(str(tmp_path / "long.txt"),),
        heldout_fraction=0,
        vocab_size=300,
        batching="token_budget",
        max_tokens=2048,
    )
    for _ in prepare_data(config, tmp_path / "data"):
        pass
    data = load_data(config, tmp_path / "data")
    batch = BatchLoader(data.train, config).next_batch()
    assert len(data.train.tokens) > 2048
    assert batch.tokens_BT.tolist() == [data.train.tokens[:2048].tolist()]
    assert batch.targets_BT.tolist() == [data.train.tokens[1:2049].tolist()]
