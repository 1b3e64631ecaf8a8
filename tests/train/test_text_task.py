"""Whose tokenizer a run has, and that a table is tokenized and ordered the same way every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.core.errors import ConfigError, DataError
from deepseek.data.tokenizing import save_tokenizer, train_encoder_tokenizer
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.text_task import find_pad_id
from tests.train.tiny_texts import configure, open_task, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:the texts yield")


@pytest.fixture
def table(tmp_path: Path) -> str:
    texts = ["a dog barks", "the house is old", "a cat sings", "the river is near"] * 5
    rows = [{"text": text, "label": text.split()[0]} for text in texts]
    return write_rows(tmp_path / "rows.jsonl", rows)


def make(folder: Path, table: str, **data: object) -> TrainConfig:
    return configure(
        folder,
        {"kind": "sequence_classification"},
        {"sources": table, "batch_size": 4, "max_len": 16, "heldout_fraction": 0.3} | data,
    )


def test_a_tokenizer_is_trained_on_the_training_rows_and_found_again(table: str, tmp_path: Path) -> None:
    config = make(tmp_path / "run", table)
    first, second = (list(open_events(config)) for _ in range(2))
    assert [event.is_reused for event in first + second] == [False, True]
    _, data, model = open_task(config)
    assert "dog" in data.tokenizer.backend.get_vocab()
    assert model.config["vocab_size"] == data.tokenizer.vocab_size


def open_events(config: TrainConfig) -> list[object]:
    from deepseek.train.tasks import find_task

    return list(find_task(config.task.kind)(config).prepare(Path(config.folder) / "data"))


def test_the_tokenizer_of_the_data_goes_before_that_of_the_model(table: str, tmp_path: Path) -> None:
    list(train(make(tmp_path / "run", table)))
    model = str(tmp_path / "run" / "model")
    _, own, _ = open_task(make(tmp_path / "own", table).override({"init": model, "init_settings": {}}))
    named = train_encoder_tokenizer(["a dog barks at the old house"] * 5, vocab_size=40)
    (tmp_path / "named").mkdir()
    save_tokenizer(named, tmp_path / "named")
    changes = {"init": model, "init_settings": {}, "data.tokenizer": str(tmp_path / "named")}
    _, other, _ = open_task(make(tmp_path / "other", table).override(changes))
    _, first, _ = open_task(make(tmp_path / "run", table))
    assert own.tokenizer.digest == first.tokenizer.digest != other.tokenizer.digest == named.digest


def test_the_position_belongs_to_the_rows_the_tokenizer_and_the_length(table: str, tmp_path: Path) -> None:
    _, data, _ = open_task(make(tmp_path / "run", table))
    state = data.loader.state_dict()
    for name, changes in {
        "longer": {"max_len": 20},
        "bpe": {"tokenizer_kind": "encoder_bpe", "vocab_size": 270},
    }.items():
        _, other, _ = open_task(make(tmp_path / name, table, **changes))
        with pytest.raises(DataError, match="belongs to other samples"):
            other.loader.load_state_dict(state)


def test_an_evaluation_that_reads_a_part_of_a_sorted_table_reads_all_kinds(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": "first" if number < 60 else "second"} for number in range(120)]
    config = make(tmp_path / "run", write_rows(tmp_path / "sorted.jsonl", rows), heldout_fraction=0.4)
    _, data, _ = open_task(config)
    first = next(iter(data.heldout())), list(data.heldout())
    assert {0, 1} <= {int(label) for batch in first[1][:3] for label in batch.labels_B}
    assert first[0].labels_B.tolist() == first[1][0].labels_B.tolist()
    assert sum(batch.num_rows for batch in first[1]) == len(config_rows(config))


def config_rows(config: TrainConfig) -> list[object]:
    return list(open_task(config)[0].rows[1])


def test_a_model_that_is_no_text_encoder_is_refused(table: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sequence_classification"):
        open_task(make(tmp_path / "run", table).override({"init": "gpt2", "init_settings": {}}))


def test_padding_is_the_tokenizers_or_token_0() -> None:
    tokenizer = train_encoder_tokenizer(["a dog"], vocab_size=270, kind="encoder_bpe")
    assert find_pad_id(tokenizer) == tokenizer.backend.token_to_id("[PAD]")
