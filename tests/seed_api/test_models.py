"""`load_model`: a path to an artifact, or a Hugging Face folder; one call, and what it holds is verified."""

import hashlib
import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deepseek as ds
from deepseek.core.errors import ConfigError, CorruptArtifactError, UnsafeFileError

TOKENS = torch.arange(40)[None] % 300


@torch.inference_mode()
def logits_of_transformers(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


@torch.inference_mode()
def logits_of_ours(folder, **options):
    return ds.load_model(folder, **options)(TOKENS)


def test_an_artifact_is_a_hugging_face_folder(model_folder):
    torch.testing.assert_close(logits_of_ours(model_folder), logits_of_transformers(model_folder), atol=1e-4, rtol=0)


def test_a_hugging_face_folder_loads(tmp_path):
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape)).save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of_ours(tmp_path), logits_of_transformers(tmp_path), atol=1e-4, rtol=0)


def test_packing_changes_how_a_model_runs_and_not_what_it_says(model_folder):
    packed = logits_of_ours(model_folder, packed=True)
    torch.testing.assert_close(packed, logits_of_transformers(model_folder), atol=1e-4, rtol=0)


def test_the_manifest_carries_the_sha256_of_every_file(model_folder):
    manifest = json.loads((model_folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in model_folder.iterdir()} - {"manifest.json"}
    for name, record in manifest["files"].items():
        assert record["sha256"] == hashlib.sha256((model_folder / name).read_bytes()).hexdigest()


def test_one_flipped_bit_is_refused(model_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors"):
        ds.load_model(folder)


def test_a_pickle_is_never_opened(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match="pickle"):
        ds.load_model(tmp_path)


def test_an_unknown_precision_is_answered_with_the_known_ones(model_folder):
    with pytest.raises(ConfigError, match="bf16"):
        ds.load_model(model_folder, precision="bf61")
