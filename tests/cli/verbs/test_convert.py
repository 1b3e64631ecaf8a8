"""`deepseek convert`: what it writes says what the source says, to us and to `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from deepseek.artifact.reading import open_artifact
from deepseek.models.loading import load_model
from tests.cli.commands import Result, assert_one_sentence

Call = Callable[..., Result]
TOKENS_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_MORE = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, _MORE),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, _MORE | {"head_dim": 16}),
    "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config, _MORE | {"pad_token_id": 0}),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, _SIZES | {"num_attention_heads": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_folder_becomes_an_artifact_that_says_the_same(call: Call, tmp_path: Path, kind: str) -> None:
    model_class, config_class, settings = KINDS[kind]
    torch.manual_seed(0)
    theirs = model_class(config_class(**settings)).eval()
    theirs.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    result = call("convert", tmp_path / "source", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    assert open_artifact(tmp_path / "out").manifest.layout == "huggingface"
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        expected = theirs(TOKENS_BT).logits
        torch.testing.assert_close(load_model(tmp_path / "out")(TOKENS_BT), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(TOKENS_BT).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_artifact_in_another_precision_names_its_parent_and_keeps_its_tokenizer(
    call: Call, model: Path, tmp_path: Path
) -> None:
    result = call("convert", model, tmp_path / "out", "--precision", "bf16", "--json")
    assert json.loads(result.out)["precision"] == "bf16"
    made, source = open_artifact(tmp_path / "out"), open_artifact(model).manifest
    assert (made.manifest.precision, made.manifest.parent_digest) == ("bf16", source.digest)
    assert made.has_file("tokenizer.json")
    assert {tensor.dtype for tensor in made.tensors().values()} == {torch.bfloat16}


def test_nothing_is_written_over_the_model_another_artifact_or_for_an_unknown_precision(
    call: Call, model: Path, tmp_path: Path
) -> None:
    assert_one_sentence(call("convert", model, model), 2, "is the model itself")
    assert_one_sentence(call("convert", model, tmp_path / "out", "--precision", "fp12"), 2, "unknown precision")
    assert call("convert", model, tmp_path / "out").status == 0
    assert_one_sentence(call("convert", model, tmp_path / "out"), 1, "holds an artifact already")
    assert call("convert", model, tmp_path / "out", "--overwrite").status == 0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "mistral", "gpt2"])
@pytest.mark.parametrize("has_tokenizer", [False, True], ids=["no tokenizer", "tokenizer"])
def test_family_token_ids_and_settings_of_generation_are_those_of_the_source(
    call: Call, tmp_path: Path, kind: str, has_tokenizer: bool
) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 3}
    sizes: dict[str, Any] = _MORE
    if kind == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = transformers.AutoConfig.for_model(kind, **sizes, **ids)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.generation_config.update(temperature=0.7, do_sample=True, eos_token_id=[5, 7])
    theirs.save_pretrained(tmp_path / "source")
    if has_tokenizer:
        words = tokenizers.models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w2")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words), eos_token="w5"
        ).save_pretrained(tmp_path / "source")
    for folder, out in (("source", "out"), ("out", "again")):
        assert call("convert", tmp_path / folder, tmp_path / out).status == 0
        settings = json.loads((tmp_path / out / "config.json").read_text())
        assert settings["model_type"] == kind
        ends = 5 if has_tokenizer else [5, 7]
        assert {name: settings[name] for name in ids} == ids | {"eos_token_id": ends}
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / out).eval()
        generation = again.generation_config
        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, [5, 7], 3)
        assert (generation.temperature, generation.do_sample) == (0.7, True)
        weights = again.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in theirs.state_dict().items())


def test_what_stands_in_the_way_names_an_option_of_the_command(call: Call, model: Path, tmp_path: Path) -> None:
    call("convert", model, tmp_path / "out")
    assert "or ask for it to be overwritten" in call("convert", model, tmp_path / "out").err
