"""`deepseek info`: what a folder holds, and every way in which it can be damaged."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek.artifact.format import Manifest
from deepseek.artifact.reading import read_manifest
from tests.cli.commands import Finished, Result, assert_one_sentence

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

Call = Callable[..., Result]


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that may be damaged."""
    return shutil.copytree(model, tmp_path / "model")


def test_the_table_names_every_file_and_the_loss(call: Call, model: Path) -> None:
    result = call("info", model)
    assert (result.status, result.err) == (0, "")
    manifest = read_manifest(model)
    for name in (*manifest.files, "decoder", "fp32", "verified", f"{manifest.metrics['heldout_loss']:.4f}"):
        assert name in result.out
    assert "not verified" in call("info", model, "--no-verify").out


def test_json_is_the_manifest(call: Call, model: Path) -> None:
    result = call("info", model, "--json")
    values = json.loads(result.out)
    assert Manifest.from_dict(values) == read_manifest(model)
    assert result.out.count("\n") == 1


def test_a_path_with_brackets_is_shown_as_it_is(call: Call, copy: Path) -> None:
    folder = copy.rename(copy.with_name("[red]model"))
    assert "[red]model" in call("info", folder).out.replace("\n", "")


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("verb", ["info", "generate", "serve", "quantize"])
def test_one_flipped_byte_is_seen_by_every_verb(
    call: Call, copy: Path, corpus: Path, tmp_path: Path, name: str, verb: str
) -> None:
    flip_byte(copy / name)
    arguments = {
        "info": [copy],
        "generate": [copy, "def "],
        "serve": [copy, "--port", "0"],
        "quantize": [copy, tmp_path / "int8", "--text", corpus],
    }
    result = call(verb, *arguments[verb])
    assert result.out == ""
    assert_one_sentence(result, 1, name)
    assert list(tmp_path.iterdir()) == [copy]


def test_a_truncated_file_is_named(call: Call, copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_one_sentence(call("info", copy), 1, "model.safetensors", "bytes")


def test_a_truncated_file_of_a_hugging_face_folder_is_named(call: Call, copy: Path) -> None:
    """There is no manifest to compare with; the format itself tells."""
    (copy / "manifest.json").unlink()
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_one_sentence(call("generate", copy, "def "), 1, "model.safetensors", "not a whole safetensors file")


def test_a_missing_file_is_named(call: Call, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert_one_sentence(call("info", copy), 1, "tokenizer.json")


def test_a_manifest_of_a_newer_schema_asks_for_an_upgrade(call: Call, copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert_one_sentence(call("info", copy), 1, "schema version 99", "upgrade")
    assert_one_sentence(call("generate", copy, "def "), 1, "schema version 99", "upgrade")


class Dangerous:
    """Its pickle writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (str(self.path),)


@pytest.mark.parametrize("verb", ["info", "generate", "serve"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_offered_as_a_model_is_refused_unread(call: Call, tmp_path: Path, verb: str, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Dangerous(tmp_path / "was-read")))
    torch.save({"weight": torch.ones(2)}, tmp_path / "alone.pt")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for path in (folder, tmp_path / "alone.pt"):
        result = call(verb, path, *(["def "] if verb == "generate" else []))
        if name == "model.safetensors" and path == folder and verb != "info":
            assert result.status in (1, 2)  # its config comes first
            assert result.err.count("\n") == 1
        else:
            assert_one_sentence(result, 1, "pickle")
    assert not (tmp_path / "was-read").exists()


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_a_path_without_a_model_is_one_sentence(call: Call, tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("text")
    if what == "empty":
        path.mkdir()
    for verb in ("info", "serve"):
        assert_one_sentence(call(verb, path), 1, str(path))


@pytest.fixture
def huggingface(copy: Path) -> Path:
    """What comes from a hub: the same folder without a manifest."""
    (copy / "manifest.json").unlink()
    return copy


def test_a_hugging_face_folder_is_described_from_its_config_and_its_weights(call: Call, huggingface: Path) -> None:
    result = call("info", huggingface, "--json")
    assert (result.status, result.err) == (0, "")
    facts = json.loads(result.out)
    stored = load_file(huggingface / "model.safetensors")
    assert facts["architecture"] == json.loads((huggingface / "config.json").read_text())["architectures"][0]
    assert facts["num_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert facts["dtypes"] == ["float32"]
    assert facts["files"] == {path.name: path.stat().st_size for path in huggingface.iterdir()}
    table = call("info", huggingface).out
    for word in ("float32", "model.safetensors", "no checksums"):
        assert word in table


def test_a_truncated_file_is_found_where_there_is_no_manifest(call: Call, huggingface: Path) -> None:
    path = huggingface / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_one_sentence(call("info", huggingface), 1, "model.safetensors", "not a whole safetensors file")


def test_the_folder_of_a_run_is_understood_as_its_model(call: Call, trained: Finished) -> None:
    run, model = trained.folder, trained.folder / "model"
    assert call("info", run) == call("info", model)
    arguments = ["--max-tokens", 4, "--seed", 1]
    assert call("generate", run, "def ", *arguments) == call("generate", model, "def ", *arguments)
    assert call("generate", run, "def ", *arguments).status == 0
