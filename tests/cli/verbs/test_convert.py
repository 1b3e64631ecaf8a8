"""`deepseek convert`: what it writes says what the source says, to us and to `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
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
