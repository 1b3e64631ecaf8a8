"""An evaluation is what a plain loop over the same data finds, whatever the model was saved as."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedTokenizerFast

from deepseek.core.errors import ArtifactError, ConfigError, DataError
from deepseek.data.tokenizing import Tokenizer, load_tokenizer, train_tokenizer
from deepseek.models import zoo
from deepseek.models.adapters import attach_, save_adapter
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import load_decoder, load_model, make_int8_, save_model
from deepseek.models.starting_weights import CAUSAL_LM, open_start
from deepseek.nn.lora import LoRAConfig, find_adapted
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.model_evaluation import EvaluationReport, evaluate_model
from tests.data.chat_examples import CHATML, CHATS, make_tokenizer
from tests.train import own_task
from tests.train.tasks import test_image_classification, test_sequence_classification
from tests.train.tiny_texts import write_rows

SHAPE = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 32, "max_length": 24}
TEXT = "the cat sat on the mat by the river, and the dog barked at it all day long. " * 12


def make_decoder(folder: Path, tokenizer: Tokenizer | None) -> Path:
    torch.manual_seed(0)
    vocab_size = 320 if tokenizer is None else tokenizer.vocab_size
    model = Decoder(DecoderConfig.from_dict(SHAPE | {"vocab_size": vocab_size}))
    with torch.no_grad():
        model.embed.weight.mul_(20)  # so that losses differ from row to row
    save_model(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = train_tokenizer([TEXT], vocab_size=320)
    return make_decoder(tmp_path_factory.mktemp("decoder") / "model", tokenizer)


def losses_of_rows(folder: Path) -> list[float]:
    """The loss of every token but the first, in rows of the model's length, row by row."""
    model, tokenizer = load_decoder(folder), load_tokenizer(folder)
    tokens = [*tokenizer.encode(TEXT), tokenizer.eos_id]
    rows = [tokens[begin : begin + SHAPE["max_length"] + 1] for begin in range(0, len(tokens) - 1, SHAPE["max_length"])]
    with torch.no_grad():
        logits = [model(torch.tensor([row[:-1]]))[0] for row in rows]
    losses = [
        F.cross_entropy(own, torch.tensor(row[1:]), reduction="none") for own, row in zip(logits, rows, strict=True)
    ]
    return [float(loss) for row in losses for loss in row]


def assert_intervals_hold(report: EvaluationReport, *names: str) -> None:
    for name in names:
        low, value, high = (report.metrics[f"{name}{end}"] for end in ("_low", "", "_high"))
        assert low < value < high


def test_the_loss_of_a_decoder_is_that_of_every_token_and_perplexity_its_exponential(decoder: Path, text: Path) -> None:
    before = sorted(path.name for path in decoder.parent.rglob("*"))
    report = evaluate_model(decoder, text)
    expected = losses_of_rows(decoder)
    assert (report.task, report.unit, report.num_units) == ("causal_lm", "tokens", len(expected))
    assert report.metrics["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert report.metrics["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    assert report.metrics["perplexity_high"] == pytest.approx(math.exp(report.metrics["loss_high"]))
    assert_intervals_hold(report, "loss", "perplexity")
    # About what the formula for a ratio of two sums over independent rows says.
    rows = [np.array(expected[begin : begin + 24]) - np.mean(expected) for begin in range(0, len(expected), 24)]
    half = 1.96 * math.sqrt(sum(row.sum() ** 2 for row in rows)) / len(expected)
    assert report.metrics["loss_high"] - report.metrics["loss_low"] == pytest.approx(2 * half, rel=0.3)
    assert sorted(path.name for path in decoder.parent.rglob("*")) == before


def test_int8_models_and_adapters_are_measured_as_they_compute(decoder: Path, text: Path, tmp_path: Path) -> None:
    save_model(make_int8_(load_decoder(decoder)), tmp_path / "int8", tokenizer=load_tokenizer(decoder))
    start = open_start(decoder, CAUSAL_LM)
    attach_(start, LoRAConfig(rank=2))
    torch.manual_seed(2)
    for layer in find_adapted(start.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    save_adapter(start.model, tmp_path / "adapter", start, LoRAConfig(rank=2))
    plain = evaluate_model(decoder, text).metrics["loss"]
    int8 = evaluate_model(tmp_path / "int8", text).metrics["loss"]
    assert int8 == pytest.approx(plain, rel=0.02)
    assert int8 != plain
    adapted = load_model(tmp_path / "adapter").module
    tokenizer = load_tokenizer(decoder)
    tokens = torch.tensor([[*tokenizer.encode(TEXT), tokenizer.eos_id][:25]])
    (tmp_path / "short.txt").write_text(tokenizer.decode(tokens[0].tolist()), encoding="utf-8")
    report = evaluate_model(tmp_path / "adapter", tmp_path / "short.txt")
    with torch.no_grad():
        first = F.cross_entropy(adapted(tokens[:, :-1])[0], tokens[0, 1:]).item()
    assert report.num_units in (24, 25)
    assert "loss_low" not in report.metrics  # too few rows for an interval
    assert report.metrics["loss"] == pytest.approx(first, rel=0.1)


def test_a_run_is_measured_with_its_own_settings(text: Path, decoder: Path, tmp_path: Path) -> None:
    values = {
        "folder": str(tmp_path / "run"),
        "init": str(decoder),
        "data": {"sources": str(text), "heldout_fraction": 0, "sequence_length": 8, "batch_size": 2},
        "num_steps": 2,
        "precision": "fp32",
    }
    list(train(TrainConfig.from_dict(values)))
    report = evaluate_model(tmp_path / "run", text)
    short = evaluate_model(tmp_path / "run" / "model", text, changes={"data.sequence_length": 8})
    assert report.metrics == short.metrics
    assert report.metrics["loss"] != evaluate_model(tmp_path / "run" / "model", text).metrics["loss"]


def test_chats_are_measured_on_what_the_assistant_says(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "model", make_tokenizer(CHATML))
    rows = [{"messages": messages} for name, messages in CHATS.items() if name != "tools"]
    data = Path(write_rows(tmp_path / "chats.jsonl", rows))
    changes = {"data.kind": "chat", "data.too_long": "split"}
    with pytest.warns(UserWarning, match="longer than a row of 24"):
        report = evaluate_model(folder, data, changes=changes)
    theirs = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend)
    masks = [
        theirs.apply_chat_template(
            row["messages"], chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        for row in rows
    ]
    assert report.num_units == sum(map(sum, masks))


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_classes_keep_the_numbers_of_the_model_where_data_have_some_of_them(tmp_path: Path) -> None:
    rows = test_sequence_classification.draw_rows()
    table = write_rows(tmp_path / "rows.jsonl", rows)
    list(train(test_sequence_classification.make(tmp_path / "run", table)))
    some = [row for row in rows if row["label"] == "places"][:5]
    report = evaluate_model(tmp_path / "run", write_rows(tmp_path / "some.jsonl", some))
    answers = load_model(tmp_path / "run").classify([row["text"] for row in some])
    num_right = sum(max(answer, key=lambda pair: pair[1])[0] == "places" for answer in answers)
    assert (report.num_units, report.unit) == (5, "texts")
    assert report.metrics["accuracy"] == num_right / 5
    assert report.metrics["accuracy_low"] <= num_right / 5 <= report.metrics["accuracy_high"]


def test_images_are_all_measured(tmp_path: Path) -> None:
    for number, name in enumerate(test_image_classification.CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for image in range(4):
            shade = np.full((9, 11, 3), 80 * number + image, dtype=np.uint8)
            Image.fromarray(shade).save(tmp_path / "images" / name / f"{image}.png")
    shape = {"init_settings": test_image_classification.TINY | {"width": 8}}
    list(train(test_image_classification.configure(tmp_path / "images", tmp_path / "run", **shape)))
    report = evaluate_model(tmp_path / "run", tmp_path / "images")
    assert (report.num_units, report.unit, report.task) == (12, "images", "image_classification")
    predictions = load_model(tmp_path / "run").classify(sorted((tmp_path / "images").rglob("*.png")))
    right = [max(answer, key=lambda pair: pair[1])[0] for answer in predictions]
    expected = [path.parent.name for path in sorted((tmp_path / "images").rglob("*.png"))]
    assert report.metrics["accuracy"] == np.mean([left == name for left, name in zip(right, expected, strict=True)])


def test_what_cannot_be_measured_is_refused_in_a_sentence(decoder: Path, text: Path, tmp_path: Path) -> None:
    bare = make_decoder(tmp_path / "bare", None)
    classifier = tmp_path / "classifier"
    save_model(zoo.build("resnet18", num_classes=3, width=4), classifier)
    (tmp_path / "empty.txt").write_text("")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    cases: list[tuple[type[Exception], str, Any]] = [
        (ConfigError, "has no tokenizer.json, by which texts become tokens", (bare, text, {})),
        (ConfigError, "holds a resnet, and what it was trained for is known to its run alone", (classifier, text, {})),
        (ArtifactError, "gone does not exist", (tmp_path / "gone", text, {"task": "sequence_classification"})),
        (ConfigError, "unknown kind of task", (decoder, text, {"task": "sleeping"})),
        (DataError, "there is no text in", (decoder, tmp_path / "empty.txt", {})),
        (DataError, "holds no file", (decoder, tmp_path / "nowhere", {})),
        (ConfigError, "decoder", (decoder, rows, {"task": "sequence_classification"})),
        (ConfigError, "unknown setting", (decoder, text, {"changes": {"data.colour": 1}})),
    ]
    for kind, message, (model, data, options) in cases:
        with pytest.raises(kind, match=message):
            evaluate_model(model, data, **options)


def test_a_head_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    save_model(zoo.build("resnet18", num_classes=7, width=4), tmp_path / "model")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    with pytest.raises(ConfigError, match="has no trained head for the task image_classification"):
        evaluate_model(tmp_path / "model", tmp_path / "images", task="image_classification")


def test_a_report_is_json(decoder: Path, text: Path) -> None:
    report = evaluate_model(decoder, text)
    assert json.loads(json.dumps(asdict(report)))["metrics"] == report.metrics


# ---- what a run held out


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def train_on_documents(folder: Path, **changes: Any) -> list[Any]:
    """A run on forty short documents, of which a part is held out; its model is far from having learned them."""
    (folder / "notes").mkdir()
    random = np.random.default_rng(0)
    for number in range(40):
        words = random.choice(["cat", "dog", "river", "sat", "on", "the", "mat"], size=random.integers(3, 30))
        (folder / "notes" / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    values = {
        "folder": str(folder / "run"),
        "model": SHAPE | {"vocab_size": 280},
        "data": {
            "sources": str(folder / "notes"),
            "vocab_size": 280,
            "heldout_fraction": 0.4,
            "sequence_length": 16,
            "batch_size": 2,
        },
        "num_steps": 3,
        "precision": "fp32",
    }
    return list(train(TrainConfig.from_dict(values).override(changes)))


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_without_data_a_model_is_measured_on_what_its_run_held_out(tmp_path: Path) -> None:
    events = train_on_documents(tmp_path)
    (evaluated,) = [event for event in events if event.kind == "evaluated"]
    before = list_files(tmp_path)
    heard: list[Any] = []
    report = evaluate_model(tmp_path / "run", on_event=heard.append)
    assert report.num_units == evaluated.num_units
    assert report.metrics["loss"] == pytest.approx(evaluated.heldout_loss, rel=1e-5)
    assert report.data == f"what the run {tmp_path / 'run'} held out of {tmp_path / 'notes'}"
    assert evaluate_model(tmp_path / "run" / "model").metrics == report.metrics
    assert list_files(tmp_path) == before
    # The text is tokenized already, and is not again.
    assert all(event.is_reused for event in heard if event.kind == "cache_ready")
    progress = [event for event in heard if event.kind == "evaluation_progress"]
    assert [event.num_batches for event in progress] == list(range(1, len(progress) + 1))
    assert {event.total_batches for event in progress} == {len(progress)}
    assert progress[-1].num_units == report.num_units


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_the_interval_of_a_loss_is_that_of_documents_drawn_again(tmp_path: Path) -> None:
    train_on_documents(tmp_path, **{"num_steps": 1})
    report = evaluate_model(tmp_path / "run", tmp_path / "notes")
    model, tokenizer = load_decoder(tmp_path / "run" / "model"), load_tokenizer(tmp_path / "run" / "model")
    texts = [path.read_text() for path in sorted((tmp_path / "notes").iterdir())]
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    numbers = np.repeat(np.arange(len(documents)), [len(tokens) for tokens in documents])[1:]
    tokens = torch.tensor([token for document in documents for token in document])
    losses = []
    with torch.no_grad():
        for begin in range(0, len(tokens) - 1, 16):
            row = tokens[begin : begin + 17]
            losses += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none").tolist()
    mean = np.mean(losses)
    assert report.metrics["loss"] == pytest.approx(mean, rel=1e-5)
    apart = np.bincount(numbers, np.array(losses) - mean)  # the formula for a ratio of sums over documents
    half = 1.96 * math.sqrt((apart**2).sum()) / len(losses)
    assert report.metrics["loss_high"] - report.metrics["loss_low"] == pytest.approx(2 * half, rel=0.2)


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_data_that_are_gone_or_were_never_held_out_are_asked_for(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was made by no run that is still here"):
        evaluate_model(decoder)
    train_on_documents(tmp_path, **{"data.heldout_fraction": 0.0})
    with pytest.raises(ConfigError, match="held nothing out; give data"):
        evaluate_model(tmp_path / "run")
    shutil.rmtree(tmp_path / "notes")
    with pytest.raises(DataError, match=r"was trained on cannot be measured on any more \(.*give other data"):
        evaluate_model(tmp_path / "run")


def test_a_task_of_ones_own_is_measured_with_the_weights_that_were_trained(tmp_path: Path) -> None:
    (evaluated,) = [
        event for event in train(own_task.configure(tmp_path / "run"), task=own_task.Line) if event.kind == "evaluated"
    ]
    for model in (tmp_path / "run", tmp_path / "run" / "model"):
        report = evaluate_model(model, task=own_task.Line)
        assert (report.task, report.unit, report.num_units) == ("Line", "points", own_task.NUM_POINTS)
        assert report.metrics["distance"] == pytest.approx(evaluated.metrics["distance"])
        assert report.metrics["loss"] == pytest.approx(evaluated.heldout_loss)
    with pytest.raises(ConfigError, match="name the task with --task MODULE:CLASS"):
        evaluate_model(tmp_path / "run")
