"""A run with an adapter trains the adapter alone, keeps it alone, and goes on bit-equal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from deepseek.artifact.reading import read_manifest
from deepseek.checkpoint.restoring import newest_valid
from deepseek.core.errors import ArtifactError, CheckpointError, ConfigError
from deepseek.data.tokenizing import save_tokenizer, train_tokenizer
from deepseek.models.adapters import continue_adapter
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import load_model, make_int8_, save_model
from deepseek.models.starting_weights import HeadSpec
from deepseek.train.config import TrainConfig
from deepseek.train.events import Evaluated, InitLoaded, StepDone
from deepseek.train.loop import train
from deepseek.train.model_evaluation import evaluate_model
from deepseek.train.tasks.causal_lm import CausalLM
from tests.train.own_task import Line
from tests.train.tasks import test_sequence_classification
from tests.train.tasks.test_causal_lm import TINY, configure, write_text
from tests.train.tiny_texts import write_rows

LORA = {"rank": 4, "targets": ["q_proj", "v_proj"]}


def make_base(folder: Path, seed: int = 0, *, is_int8: bool = False) -> Path:
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig.from_dict(TINY))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(make_int8_(model) if is_int8 else model, folder)
    return folder


def configure_adapter(tmp_path: Path, name: str, **changes: Any) -> TrainConfig:
    text = tmp_path / "text"
    if not text.exists():
        write_text(text)
    optimizer = {"name": "adamw", "base_learning_rate": 0.64, "warmup_steps": 0}
    values = {"init": str(tmp_path / "base"), "adapter": LORA, "optimizer": optimizer, "num_steps": 6}
    return configure(text, tmp_path / name, **(values | {"checkpoint_every": 3} | changes))


@pytest.mark.parametrize("is_int8", [False, True])
def test_the_adapter_is_all_that_is_trained_and_kept(is_int8: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", is_int8=is_int8)
    before = (base / "model.safetensors").read_bytes()
    events = list(train(configure_adapter(tmp_path, "run")))
    steps = [event for event in events if isinstance(event, StepDone)]
    assert steps[-1].loss < steps[0].loss
    assert (base / "model.safetensors").read_bytes() == before
    manifest = read_manifest(tmp_path / "run" / "model")
    assert manifest.architecture == "adapter"
    assert manifest.parent_digest == read_manifest(base).digest
    checkpoint = newest_valid(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    names = [f"layers.{i}.attention.{part}_proj.lora_{which}" for i in range(2) for part in "qv" for which in "AB"]
    assert sorted(checkpoint.state["model"]) == sorted(names)
    # What is loaded answers as the run's last evaluation measured it.
    (evaluated,) = [event for event in events if isinstance(event, Evaluated)]
    assert manifest.metrics["heldout_loss"] == evaluated.heldout_loss
    adapted, plain = load_model(tmp_path / "run"), load_model(base)
    tokens = torch.randint(0, 280, (2, 12))
    assert (adapted(tokens) - plain(tokens)).abs().max() > 1e-3


def test_a_run_that_was_stopped_goes_on_bit_equal(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    settings = {"adapter": LORA | {"dropout": 0.2}}
    list(train(configure_adapter(tmp_path, "whole", **settings)))
    events = train(configure_adapter(tmp_path, "stopped", **settings))
    for event in events:
        if isinstance(event, StepDone) and event.step == 4:
            break
    events.close()
    list(train(configure_adapter(tmp_path, "stopped", **settings)))
    states = [newest_valid(tmp_path / name / "checkpoints").state["model"] for name in ("whole", "stopped")]  # type: ignore[union-attr]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_base_that_has_changed_is_refused(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    list(train(configure_adapter(tmp_path, "run")))
    torch.manual_seed(1)
    save_model(Decoder(DecoderConfig.from_dict(TINY)), tmp_path / "base", overwrite=True)
    with pytest.raises(CheckpointError, match="is of an adapter on other weights than those of init="):
        list(train(configure_adapter(tmp_path, "run", num_steps=8)))
    with pytest.raises(ArtifactError, match="was trained on the model"):
        load_model(tmp_path / "run")


def test_frozen_parameters_stay_through_a_run(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    list(train(configure_adapter(tmp_path, "run", adapter=None, freeze=["embed", "layers.0"])))
    before, after = (load_model(tmp_path / name).state_dict() for name in ("base", "run"))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith(("embed", "head", "layers.0.")), name


def test_a_pattern_that_matches_nothing_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    for changes, name in (
        ({"freeze": ["layer.0"]}, "freeze"),
        ({"adapter": {"targets": ["query"]}}, "adapter.targets"),
    ):
        with pytest.raises(ConfigError, match=rf"{name} has the pattern"):
            list(train(configure_adapter(tmp_path, "run", **changes)))
    assert not (tmp_path / "run" / "model").exists()


def test_an_adapter_without_init_or_without_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an adapter is trained on weights that exist, and init is not given"):
        TrainConfig.from_dict({"adapter": LORA})
    with pytest.raises(ConfigError, match=r"setting 'adapter\.rank' is 0: input should be greater than or equal to 1"):
        TrainConfig.from_dict({"init": "x", "adapter": {"rank": 0}})
    config = configure_adapter(tmp_path, "run", init=str(make_base(tmp_path / "base")))
    with pytest.raises(ConfigError, match="adapter is for models that init names, and Line begins with one of its own"):
        list(train(config, task=Line))


def write_folder_of_hugging_face(folder: Path, text: Path) -> Path:
    """A small Llama of `transformers` with its tokenizer."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(text.iterdir())]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_folder_of_hugging_face_is_fine_tuned_and_opens_there_again(has_adapter: bool, tmp_path: Path) -> None:
    folder = write_folder_of_hugging_face(tmp_path / "llama", write_text(tmp_path / "text"))
    config = configure_adapter(tmp_path, "run", init=str(folder), adapter=LORA if has_adapter else None)
    steps = [event for event in train(config) if isinstance(event, StepDone)]
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    task = CausalLM(config)
    batch = task.open_data(tmp_path / "run" / "data").loader.next_batch()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(
            model(batch.tokens_BT).logits.flatten(0, 1), batch.targets_BT.flatten()
        )
    assert steps[0].loss == pytest.approx(loss.item(), rel=1e-5)
    assert steps[-1].loss < steps[0].loss
    tuned, tokens = load_model(tmp_path / "run"), batch.tokens_BT
    if has_adapter:
        pairs = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
        for name in [name.removesuffix(".lora_A.weight") for name in pairs if name.endswith(".lora_A.weight")]:
            weight = model.get_parameter(name.removeprefix("base_model.model.") + ".weight")
            weight.data += 16 / 4 * pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"]
    else:
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(tuned(tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_goes_on_with_what_it_learned(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    first = list(train(configure_adapter(tmp_path, "first", adapter=LORA | {"alpha": 4.0})))
    (evaluated,) = [event for event in first if isinstance(event, Evaluated)]
    before = load_file(tmp_path / "first" / "model" / "adapter_model.safetensors")
    still = {"name": "sgd", "base_learning_rate": 1e-9, "warmup_steps": 0, "weight_decay": 0.0}
    changes: dict[str, Any] = {"init": str(tmp_path / "first"), "adapter": None}
    events = list(train(configure_adapter(tmp_path, "still", **changes, optimizer=still)))
    # A run that hardly moves ends with the adapter that it began with, in the same file.
    (again,) = [event for event in events if isinstance(event, Evaluated)]
    assert again.heldout_loss == pytest.approx(evaluated.heldout_loss, rel=1e-5)
    after = load_file(tmp_path / "still" / "model" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)
    assert read_manifest(tmp_path / "still" / "model").parent_digest == read_manifest(base).digest
    # One that moves, and is stopped on the way, ends as one that was not.
    list(train(configure_adapter(tmp_path, "whole", **changes | {"adapter": LORA | {"alpha": 4.0}})))
    events = train(configure_adapter(tmp_path, "stopped", **changes))
    for event in events:
        if isinstance(event, StepDone) and event.step == 4:
            break
    events.close()
    list(train(configure_adapter(tmp_path, "stopped", **changes)))
    whole, stopped = (
        load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
    assert any((tensor - before[name]).abs().max() > 1e-3 for name, tensor in whole.items())


def test_an_adapter_of_another_base_rank_or_task_is_not_gone_on_with(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    list(train(configure_adapter(tmp_path, "first")))
    init = {"init": str(tmp_path / "first")}
    with pytest.raises(ConfigError, match=r"is an adapter of rank=4, .* and adapter has rank=8; leave adapter out"):
        list(train(configure_adapter(tmp_path, "second", **init, adapter=LORA | {"rank": 8})))
    with pytest.raises(
        ConfigError, match=r"adapter has targets=\['q_proj', 'k_proj'\], which are other layers than its"
    ):
        list(train(configure_adapter(tmp_path, "second", **init, adapter=LORA | {"targets": ["q_proj", "k_proj"]})))
    with pytest.raises(ConfigError, match="is an adapter for causal_lm, and this run trains one for masked_lm"):
        continue_adapter(tmp_path / "first" / "model", HeadSpec("masked_lm"))
    shutil.rmtree(tmp_path / "base")
    make_base(tmp_path / "base", seed=1)
    with pytest.raises(ArtifactError, match=r"was trained on the model .* give the folder of its own base"):
        list(train(configure_adapter(tmp_path, "second", **init, adapter=None)))
    assert not (tmp_path / "second" / "model").exists()


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_an_adapter_with_a_head_of_its_own_goes_on_and_is_measured(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.jsonl", test_sequence_classification.draw_rows())
    list(train(test_sequence_classification.make(tmp_path / "base", table)))
    config = test_sequence_classification.make(tmp_path / "first", table)
    changes = {"init": str(tmp_path / "base"), "init_settings": {}, "adapter": {"rank": 2}}
    config = config.override({**changes, "task.labels": ["animals", "places", "other"], "evaluation_units": 0})
    (evaluated,) = [event for event in train(config) if isinstance(event, Evaluated)]
    report = evaluate_model(tmp_path / "first")
    assert report.metrics["loss"] == pytest.approx(evaluated.heldout_loss, rel=1e-4)
    assert report.metrics["accuracy"] == evaluated.metrics["accuracy"]
    again = config.override({"folder": str(tmp_path / "second"), "init": str(tmp_path / "first"), "adapter": None})
    events = list(train(again))
    assert next(event for event in events if isinstance(event, InitLoaded)).new_tensors == ()
    assert read_manifest(tmp_path / "second" / "model").architecture == "adapter"
    with pytest.raises(ConfigError, match=r"with 3 outputs \(animals, places, other\), and this run trains one for"):
        list(train(again.override({"folder": str(tmp_path / "third"), "task.labels": ["animals", "places"]})))
