"""A merged model answers as its adapter does on its base; `generate` takes the adapter as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from deepseek.artifact.reading import read_manifest
from deepseek.data.tokenizing import load_tokenizer
from deepseek.models.adapters import attach_, save_adapter
from deepseek.models.loading import load_decoder, load_model, make_int8_, save_model
from deepseek.models.starting_weights import CAUSAL_LM, open_start
from deepseek.nn.lora import LoRAConfig, find_adapted
from tests.cli.commands import Result, assert_one_sentence

Call = Callable[..., Result]
TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def make_adapter(base: Path, folder: Path) -> Path:
    start = open_start(base, CAUSAL_LM, allow_int8=True)
    config = LoRAConfig(rank=2)
    attach_(start, config)
    torch.manual_seed(2)
    for layer in find_adapted(start.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(start.model, folder, start, config, metrics={"heldout_loss": 2.0})
    return folder


def test_the_merged_model_is_the_adapter_on_its_base(call: Call, model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter")
    result = call("merge-adapter", adapter, tmp_path / "merged", "--json")
    assert (result.status, result.err) == (0, "")
    manifest = json.loads(result.out)
    assert manifest["parent_digest"] == read_manifest(adapter).digest
    assert manifest["metrics"] == {"heldout_loss": 2.0}
    merged, adapted, base = (load_model(folder) for folder in (tmp_path / "merged", adapter, model))
    torch.testing.assert_close(merged(TOKENS), adapted(TOKENS), rtol=1e-4, atol=1e-5)
    assert (merged(TOKENS) - base(TOKENS)).abs().max() > 1e-3
    assert load_tokenizer(tmp_path / "merged").digest == load_tokenizer(model).digest
    texts = [call("generate", folder, "def import ", "--max-tokens", "12") for folder in (adapter, tmp_path / "merged")]
    assert [text.status for text in texts] == [0, 0]
    assert texts[0].out == texts[1].out != "def import \n"


def test_an_int8_base_becomes_float(call: Call, model: Path, tmp_path: Path) -> None:
    save_model(make_int8_(load_decoder(model)), tmp_path / "int8", tokenizer=load_tokenizer(model))
    adapter = make_adapter(tmp_path / "int8", tmp_path / "adapter")
    assert call("generate", adapter, "def ", "--max-tokens", "4").status == 0
    assert call("merge-adapter", adapter, tmp_path / "merged").status == 0
    assert read_manifest(tmp_path / "merged").precision == "fp32"
    merged, adapted = load_model(tmp_path / "merged")(TOKENS), load_model(adapter)(TOKENS)
    error = (merged - adapted).norm() / adapted.norm()  # activations are no longer rounded
    assert 0 < error < 0.05


def test_what_cannot_be_merged_is_explained_in_one_sentence(call: Call, model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter")
    save_model(make_int8_(load_decoder(model)), tmp_path / "other")
    for status, arguments, message in (
        (2, (model, tmp_path / "out"), "is no adapter; give a folder with an adapter_config.json"),
        (1, (adapter, tmp_path / "out", "--base", tmp_path / "other"), "was trained on the model"),
        (1, (adapter, tmp_path / "out", "--base", tmp_path / "nothing"), "which is not there"),
        (2, (adapter, tmp_path / "out", "--precision", "fp12"), "unknown precision 'fp12'"),
    ):
        result = call("merge-adapter", *arguments)
        assert_one_sentence(result, status)
        assert message in result.err
        assert not (tmp_path / "out").exists()
