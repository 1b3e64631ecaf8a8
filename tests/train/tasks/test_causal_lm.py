"""The loss of the task is torch's cross-entropy over the targets that count."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deepseek.artifact.reading import read_manifest
from deepseek.core.errors import ConfigError
from deepseek.data.batching import IGNORED_TARGET, Batch
from deepseek.data.tokenizing import load_tokenizer, save_tokenizer
from deepseek.distributed.parallel.sequence_ring import SequenceRing
from deepseek.mixed_precision.layer_precision import Compute, set_compute_
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import load_model, make_int8_
from deepseek.nn.lora import LoRALinear
from deepseek.train.config import TrainConfig
from deepseek.train.events import InitLoaded, StepDone
from deepseek.train.loop import train
from deepseek.train.steps import summed_loss
from deepseek.train.tasks.causal_lm import CausalLM
from tests.data.chat_examples import CHATML, CHATS, make_tokenizer, without_marks

SHAPE = {"vocab_size": 32, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_length": 16}


def test_the_loss_is_torchs_over_the_targets_that_count() -> None:
    torch.manual_seed(0)
    task = CausalLM(TrainConfig.from_dict({"model": SHAPE, "data": {"sequence_length": 8, "max_len": 16}}))
    model = Decoder(DecoderConfig.from_dict(SHAPE))
    targets = torch.randint(0, 32, (3, 8))
    targets[1, 4:] = IGNORED_TARGET
    batch = Batch(torch.randint(0, 32, (3, 8)), targets, int((targets != IGNORED_TARGET).sum()))
    outputs = task.forward(model, batch)
    expected = F.cross_entropy(model(batch.tokens_BT).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(task.loss(outputs, batch), expected)
    assert task.count_units(batch) == 20


def test_a_batch_is_cut_with_its_targets_and_documents() -> None:
    task = CausalLM(TrainConfig.from_dict({"model": SHAPE, "data": {"sequence_length": 8, "max_len": 16}}))
    tokens = torch.arange(8)[None]
    targets = torch.where(tokens == 6, IGNORED_TARGET, tokens + 1)
    cut = task.cut_sequence(Batch(tokens, targets, 7, documents_BT=tokens // 4), SequenceRing(None, 0, 2))  # type: ignore[arg-type]
    assert cut.tokens_BT.tolist() == [[0, 1, 6, 7]] and cut.targets_BT.tolist() == [[1, 2, IGNORED_TARGET, 8]]
    assert cut.documents_BT is not None and cut.documents_BT.tolist() == [[0, 0, 1, 1]]
    assert cut.num_target_tokens == 3 and cut.sources_BT is None


def make_batch() -> Batch:
    torch.manual_seed(0)
    targets = torch.randint(0, 32, (3, 8))
    targets[1, 4:] = IGNORED_TARGET
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]).expand(3, 8)
    return Batch(torch.randint(0, 32, (3, 8)), targets, 20, documents_BT=documents)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"logits_softcap": 2.0}])
def test_a_step_without_logits_has_the_loss_and_the_gradients_of_them(changes: dict[str, Any]) -> None:
    batch, task = make_batch(), CausalLM(TrainConfig())
    model = Decoder(DecoderConfig.from_dict(SHAPE | changes)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    loss, expected = task.loss_without_outputs(model, batch), task.loss(task.forward(model, batch), batch)
    assert loss is not None
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


class Halved(CausalLM):
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().loss(outputs, batch) / 2


def test_a_step_has_logits_where_anything_else_sees_or_changes_them() -> None:
    batch, task = make_batch(), CausalLM(TrainConfig())
    seen: list[int] = []

    def adapt_(model: Decoder) -> None:
        model.head = LoRALinear(model.head, 2, 1.0)  # type: ignore[assignment]

    def add_bias_(model: Decoder) -> None:
        model.head = torch.nn.Linear(16, 32)

    for change in (
        adapt_,
        add_bias_,
        make_int8_,
        lambda model: model.head.register_forward_hook(lambda *_: seen.append(1)),
        lambda model: model.register_forward_hook(lambda *_: seen.append(1)),
        lambda model: set_compute_(model.head, Compute("cpu", torch.bfloat16, is_layer=True)),
        lambda model: set_compute_(model, Compute("cpu", torch.bfloat16, is_root=True)),
    ):
        model = Decoder(DecoderConfig.from_dict(SHAPE | {"tie_embeddings": False}))
        change(model)
        assert task.loss_without_outputs(model, batch) is None
        summed_loss(task, model, batch, precision="fp32")
    assert len(seen) == 2
    model = Decoder(DecoderConfig.from_dict(SHAPE))
    half = summed_loss(Halved(TrainConfig()), model, batch, precision="fp32")
    torch.testing.assert_close(half, summed_loss(task, model, batch, precision="fp32") / 2)


def test_evaluation_sees_the_mask_wholly_in_force() -> None:
    settings = {"model": SHAPE | {"mask": {"opening_steps": 100}}, "data": {"sequence_length": 8, "max_len": 16}}
    task = CausalLM(TrainConfig.from_dict(settings))
    model = Decoder(task.config.model)
    tokens = torch.randint(0, 32, (1, 12))
    model.eval()
    task.on_step(model, 0)
    opening = model(tokens)
    task.on_step(model, 0, is_evaluating=True)
    closed = model(tokens)
    task.on_step(model, 100)
    assert torch.equal(closed, model(tokens))
    assert not torch.equal(opening, closed)


def write_text(folder: Path) -> Path:
    folder.mkdir()
    source = random.Random(0)
    words = ["def", "return", "import", "class", "self", "value", "for", "in", "range", "print"]
    for number in range(6):
        lines = [" ".join(source.choices(words, k=8)) for _ in range(40)]
        (folder / f"text{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def configure(text: Path, folder: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "folder": str(folder),
        "data": {
            "sources": [str(text)],
            "heldout_fraction": 0.3,
            "vocab_size": 280,
            "sequence_length": 16,
            "batch_size": 4,
        },
        "num_steps": 3,
        "log_every": 1,
        "precision": "fp32",
    }
    return TrainConfig.from_dict(values | changes)


TINY = {"vocab_size": 280, "num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_size": 32, "max_length": 32}


def test_training_goes_on_with_the_weights_and_the_tokenizer_of_init(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    first = list(train(configure(text, tmp_path / "first", model=TINY)))
    parent = read_manifest(tmp_path / "first" / "model")
    config = configure(text, tmp_path / "second", init=str(tmp_path / "first"))
    events = list(train(config))
    (loaded,) = [event for event in events if isinstance(event, InitLoaded)]
    assert loaded.parent_digest == parent.digest
    assert loaded.new_tensors == ()
    tokenizers = [load_tokenizer(tmp_path / name / "model") for name in ("first", "second")]
    assert tokenizers[0].digest == tokenizers[1].digest
    assert read_manifest(tmp_path / "second" / "model").parent_digest == parent.digest
    # The first step's loss is that of the model it begins with, on the first rows.
    task = CausalLM(config)
    data = task.open_data(tmp_path / "second" / "data")
    batch = data.loader.next_batch()
    model = load_model(tmp_path / "first").module
    with torch.no_grad():
        expected = F.cross_entropy(model(batch.tokens_BT).flatten(0, 1), batch.targets_BT.flatten())
    steps = [event for event in events if isinstance(event, StepDone)]
    assert steps[0].loss == pytest.approx(expected.item(), rel=1e-5)
    assert steps[0].loss < next(event for event in first if isinstance(event, StepDone)).loss


def test_a_named_decoder_begins_with_random_weights(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    events = list(train(configure(text, tmp_path / "run", init="gpt2", init_settings=TINY)))
    (loaded,) = [event for event in events if isinstance(event, InitLoaded)]
    assert loaded.summary == "gpt2 with random weights"
    assert read_manifest(tmp_path / "run" / "model").parent_digest is None


def test_another_vocabulary_is_said_or_refused(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    for vocab_size, message in ((300, "300, of which the others are never learned"), (270, "take the tokenizer")):
        config = configure(
            text, tmp_path / f"run{vocab_size}", init="gpt2", init_settings=TINY | {"vocab_size": vocab_size}
        )
        task = CausalLM(config)
        list(task.prepare(tmp_path / f"data{vocab_size}"))
        data = task.open_data(tmp_path / f"data{vocab_size}")
        if vocab_size == 300:
            with pytest.warns(UserWarning, match=message):
                task.build_model(data)
        else:
            with pytest.raises(ConfigError, match=message):
                task.build_model(data)


def test_rows_longer_than_the_model_of_init_takes_are_refused(tmp_path: Path) -> None:
    config = configure(write_text(tmp_path / "text"), tmp_path, init="gpt2", init_settings=TINY | {"max_length": 8})
    with pytest.raises(ConfigError, match=r"rows of 16 tokens and the model of init=gpt2 takes 8; shorten"):
        list(train(config))


def write_chat_model(folder: Path) -> LlamaForCausalLM:
    """A small Llama of transformers with a tokenizer that has a chat template."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(shape)
    model.save_pretrained(folder)
    save_tokenizer(make_tokenizer(without_marks(CHATML)), folder)
    return model


def configure_chats(tmp_path: Path, **changes: Any) -> TrainConfig:
    rows = [{"messages": messages} for name, messages in CHATS.items() if name != "tools"] * 2
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "folder": str(tmp_path / "run"),
        "init": str(tmp_path / "base"),
        "task": "causal_lm",
        "data": {
            "kind": "chat",
            "sources": str(tmp_path / "chats.jsonl"),
            "heldout_fraction": 0,
            "sequence_length": 128,
            "batch_size": 3,
        },
        "optimizer": {"name": "sgd", "base_learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0},
        "num_steps": 4,
        "log_every": 1,
        "precision": "fp32",
    }
    return TrainConfig.from_dict(values).override(changes)


def test_a_step_on_packed_chats_is_that_of_transformers_on_each_chat_alone(tmp_path: Path) -> None:
    theirs = write_chat_model(tmp_path / "base")
    plain = {"optimizer.weight_decay": 0.0, "optimizer.momentum": 0.0, "optimizer.grad_clip": None, "num_steps": 1}
    config = configure_chats(tmp_path, **plain)
    task = CausalLM(config)
    list(task.prepare(tmp_path / "data"))
    num_rows = task.open_data(tmp_path / "data").loader._plan.num_items
    config = config.override({"data.batch_size": num_rows})  # one batch is the epoch
    (step,) = [event for event in train(config) if isinstance(event, StepDone)]

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend)
    total, count = torch.zeros(()), 0
    for messages in [messages for name, messages in CHATS.items() if name != "tools"] * 2:
        found = tokenizer.apply_chat_template(
            messages, chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        targets = torch.where(found["assistant_masks"] == 1, found["input_ids"], -100)
        logits = theirs(found["input_ids"]).logits
        total = total + F.cross_entropy(logits[0, :-1], targets[0, 1:], reduction="sum")
        count += int(found["assistant_masks"].sum())
    (total / count).backward()
    assert step.loss == pytest.approx((total / count).item(), rel=1e-5)
    assert num_rows < 2 * len(CHATS) - 2
    ours = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - step.learning_rate * parameter.grad
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(ours[name], parameter)


def test_a_run_on_chats_that_is_stopped_and_resumed_becomes_the_same_model(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "base")
    whole = configure_chats(tmp_path, **{"data.heldout_fraction": 0.2})
    list(train(whole))
    stopped = whole.override({"folder": str(tmp_path / "stopped")})
    events = train(stopped)
    next(event for event in events if isinstance(event, StepDone) and event.step == 3)
    events.close()
    list(train(stopped))
    digests = [
        read_manifest(tmp_path / name / "model").files["model.safetensors"].sha256 for name in ("run", "stopped")
    ]
    assert digests[0] == digests[1]
    tokenizer = load_tokenizer(tmp_path / "run" / "model")
    assert tokenizer.backend.token_to_id("<|im_end|>") in tokenizer.end_ids
    assert tokenizer.chat_template == without_marks(CHATML)


def test_packed_documents_of_text_have_the_loss_of_each_alone(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    packed = {"batching": "packed_documents", "document_separator": "\n", "sequence_length": 64}
    config = configure(text, tmp_path / "run", model=TINY | {"max_length": 64})
    config = config.override({f"data.{name}": value for name, value in packed.items()})
    task = CausalLM(config)
    list(task.prepare(tmp_path / "data"))
    data = task.open_data(tmp_path / "data")
    batch = data.loader.next_batch()
    model = task.build_model(data).double()
    outputs = task.forward(model, batch)
    assert batch.documents_BT is not None
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch.tokens_BT)):
        for document in batch.documents_BT[row].unique():
            mine = batch.documents_BT[row] == document
            logits = model(batch.tokens_BT[row][mine][None])[0]
            expected = expected + F.cross_entropy(logits, batch.targets_BT[row][mine], reduction="sum").nan_to_num()
    torch.testing.assert_close(task.loss(outputs, batch), expected)
    assert int(batch.documents_BT.max()) > 1


def test_chats_longer_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "base")
    with pytest.raises(
        ConfigError, match=r"data\.sequence_length makes rows of 512 tokens and the model of init=.* 256"
    ):
        list(train(configure_chats(tmp_path, **{"data.sequence_length": 512})))
