"""The loss is that of transformers on the same rows, only hidden tokens count, and a run repeats to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.core.errors import ConfigError, DataError
from deepseek.data.batching import IGNORED_TARGET
from deepseek.data.masking import read_vocabulary
from deepseek.data.text_collate import TextSample
from deepseek.models.loading import load_model
from deepseek.models.transformers_models.model import TransformersModel, build_transformers
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.tasks.masked_lm import MaskedLM, MaskedText, find_head
from tests.train.tiny_texts import (
    SGD,
    SHAPE,
    STILL,
    assert_accumulation_is_one_batch,
    assert_resume_is_bit_equal,
    configure,
    open_task,
)

WORDS = ["the", "small", "dog", "barks", "at", "a", "cat", "by", "river", "and", "old", "house", "water", "birds"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, size=random.integers(4, 20))) for _ in range(150)]
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(lines))
    return str(path)


def make(folder: Path, text: str, task: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    data = {
        "sources": text,
        "document_separator": "\n",
        "tokenizer_kind": "wordpiece",
        "sequence_length": 24,
        "batch_size": 4,
        "max_tokens": 96,
        "max_len": 24,
        "vocab_size": 300,
    }
    return configure(folder, {"kind": "masked_lm"} | (task or {}), data, **changes)


@pytest.mark.filterwarnings("ignore:the texts yield")
@pytest.mark.parametrize("batching", ["packed", "token_budget"])
def test_the_loss_is_that_of_transformers(batching: str, text: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, text).override({"data.batching": batching}))
    for batch in (data.loader.next_batch(), next(iter(data.heldout()))):
        labels = torch.full(batch.inputs["input_ids"].shape, IGNORED_TARGET).flatten()
        labels[batch.places_M] = batch.targets_M
        labels = labels.view_as(batch.inputs["input_ids"])
        expected = model.model(**batch.inputs, labels=labels).loss
        loss = task.loss(task.forward(model, batch), batch) / task.count_units(batch)
        torch.testing.assert_close(loss, expected)
        assert ("attention_mask" in batch.inputs) == (batching == "token_budget")
        assert task.count_units(batch) == len(batch.targets_M) > 0


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_rows_begin_and_end_as_bert_has_them_and_cover_the_text(text: str, tmp_path: Path) -> None:
    task, data, _ = open_task(make(tmp_path, text))
    tokenizer = data.tokenizer
    rows = data.loader.source
    seen = []
    for index in range(len(rows)):
        sample = rows.load(index, None)
        original = np.where(sample.targets_T == IGNORED_TARGET, sample.text.tokens_T, sample.targets_T)
        assert len(original) == 24
        assert (original[0], original[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        seen.append(original[1:-1])
    tokens = np.fromfile(tmp_path / "data" / "train" / "tokens.bin", dtype=np.uint16)
    assert np.array_equal(np.concatenate(seen[:-1]), tokens[: 22 * (len(rows) - 1)])
    assert np.array_equal(seen[-1], tokens[-22:])
    assert task.unit == "tokens"


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_what_is_hidden_depends_on_the_row_and_the_epoch_alone(text: str, tmp_path: Path) -> None:
    few, many = (
        open_task(make(tmp_path / name, text).override({"data.batch_size": size}))[1].loader
        for name, size in (("few", 2), ("many", 4))
    )
    first, second = few.next_batch(), few.next_batch()
    together = many.next_batch()
    assert torch.equal(torch.cat([first.inputs["input_ids"], second.inputs["input_ids"]]), together.inputs["input_ids"])
    source = few.source
    assert not np.array_equal(
        source.load(0, np.random.default_rng(1)).targets_T, source.load(0, np.random.default_rng(2)).targets_T
    )
    assert np.array_equal(source.load(0, None).targets_T, source.load(0, None).targets_T)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]} | SHAPE,
        {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]} | SHAPE,
        {"model_type": "electra", "architectures": ["ElectraForMaskedLM"], "embedding_size": 12} | SHAPE,
        {"model_type": "albert", "architectures": ["AlbertForMaskedLM"], "embedding_size": 12} | SHAPE,
        {"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"]}
        | {"n_layers": 1, "dim": 24, "n_heads": 2, "hidden_dim": 48},
        {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]} | SHAPE | {"pad_token_id": 0},
        {"model_type": "mpnet", "architectures": ["MPNetForMaskedLM"]} | SHAPE,
    ],
    ids=lambda values: values["model_type"],
)
def test_the_head_on_hidden_tokens_alone_gives_their_logits(values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build_transformers(values | {"vocab_size": 90})
    assert find_head(model) is not None
    task = object.__new__(MaskedLM)
    task._pad_id = 1
    random = np.random.default_rng(0)
    rows = [random.integers(5, 90, size=length) for length in (9, 6)]
    samples = [MaskedText(TextSample(row), np.where(random.random(len(row)) < 0.4, row, -100)) for row in rows]
    batch = task.collate(samples)
    expected = model(**{name: batch.inputs[name] for name in model.input_names if name in batch.inputs})
    torch.testing.assert_close(task.forward(model, batch), expected.flatten(0, 1)[batch.places_M])


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_micro_batches_with_unequal_numbers_of_hidden_tokens_add_up(text: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, text, optimizer=SGD))
    samples = [data.loader.source.load(index, np.random.default_rng(index)) for index in range(4)]
    counts = [int((sample.targets_T != IGNORED_TARGET).sum()) for sample in samples]
    assert len(set(counts)) > 1
    assert_accumulation_is_one_batch(task, model, samples)


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_a_row_in_a_batch_has_the_logits_that_it_has_alone(text: str, tmp_path: Path) -> None:
    task, data, model = open_task(make(tmp_path, text).override({"data.batching": "token_budget"}))
    samples = [data.loader.source.load(index, None) for index in range(4)]
    together = task.forward(model, task.collate(samples))
    alone = torch.cat([task.forward(model, task.collate([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_a_stopped_run_becomes_bit_equal_with_dropout_too(text: str, tmp_path: Path) -> None:
    assert_resume_is_bit_equal(lambda name: make(tmp_path / name, text, {"whole_words": True}, init_settings=SHAPE))


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_the_model_is_saved_as_transformers_has_it_and_trained_on_from_there(text: str, tmp_path: Path) -> None:
    list(train(make(tmp_path / "first", text)))
    folder = tmp_path / "first" / "model"
    loaded = load_model(folder).module
    assert isinstance(loaded, TransformersModel)
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    task, data, model = open_task(make(tmp_path / "more", text, init=str(folder), init_settings={}))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert data.tokenizer.special_tokens["mask_token"] == "[MASK]"
    assert task.start.parent_digest


def test_training_lowers_the_loss(text: str, tmp_path: Path) -> None:
    config = make(tmp_path, text, num_steps=60, optimizer={"warmup_steps": 0, "base_learning_rate": 0.3})
    with pytest.warns(UserWarning, match="the texts yield"):
        events = list(train(config))
    losses = [event.loss for event in events if event.kind == "step_done"]
    assert sum(losses[-10:]) / 10 < losses[0] - 0.5


@pytest.mark.filterwarnings("ignore:the texts yield")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data.tokenizer_kind": "bpe"}, "no mask token.*tokenizer_kind=wordpiece"),
        ({"data.sequence_length": 2}, "no room beside its special tokens"),
        ({"data.sequence_length": 100}, "rows may have 100 tokens and the model of init=bert-base takes 64"),
        ({"data.batching": "packed_documents"}, "no document masks.*choose packed or token_budget"),
        ({"data.batch_size": 10_000}, "samples and a batch takes 10000; lower batch_size"),
        ({"init": "llama-135m"}, "trains one for masked_lm"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    changes: dict[str, Any], expected: str, text: str, tmp_path: Path
) -> None:
    config = make(tmp_path, text, **({"init_settings": {}} if "init" in changes else {})).override(changes)
    with pytest.raises((ConfigError, DataError), match=expected):
        open_task(config)
    assert not (tmp_path / "model").exists()


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_a_model_with_fewer_tokens_than_the_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ tokens and the model of init=bert-base 40"):
        open_task(make(tmp_path, text, init_settings=SHAPE | STILL | {"vocab_size": 40}))
    task, data, _ = open_task(make(tmp_path / "other", text))
    assert not read_vocabulary(data.tokenizer).is_special_V.all()
    assert task.config.data.kind == "text"
