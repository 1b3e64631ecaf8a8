import json
from pathlib import Path

import pytest
import torch

from deepseek.artifact.format import SCHEMA_VERSION, Description, Manifest
from deepseek.artifact.reading import open_artifact, read_manifest, read_tensors
from deepseek.artifact.writing import write_artifact, write_tensor_file
from deepseek.core.errors import ArtifactError, CorruptArtifactError, UnsupportedSchemaError

DESCRIPTION = Description(architecture="decoder", architecture_config={"num_layers": 2}, metrics={"loss": 1.5})


@pytest.fixture
def folder(tmp_path):
    tensors = {"weight": torch.arange(12.0).reshape(3, 4), "scale": torch.tensor(0.5).bfloat16()}
    write_artifact(tmp_path / "model", tensors, DESCRIPTION, files={"tokenizer.json": b'{"a": 1}'})
    return tmp_path / "model"


def test_an_artifact_gives_back_manifest_tensors_and_files(folder):
    artifact = open_artifact(folder)
    assert Description(**artifact.manifest.model_dump(include=set(Description.model_fields))) == DESCRIPTION
    assert artifact.tensors()["weight"].tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert artifact.tensors()["scale"].dtype is torch.bfloat16
    assert artifact.read_bytes("tokenizer.json") == b'{"a": 1}'
    with pytest.raises(ArtifactError, match=r"did you mean 'tokenizer\.json'"):
        artifact.read_bytes("tokeniser.json")


def test_tensors_are_mapped_and_writing_to_them_leaves_the_file(folder):
    weight = open_artifact(folder).tensors()["weight"]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert any(line.endswith(str(folder / "model.safetensors")) for line in mapped)
    weight.zero_()
    assert open_artifact(folder).tensors()["weight"].sum() == 66


def test_a_path_without_an_artifact_is_explained(folder, tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="is a file; give the folder"):
        open_artifact(folder / "manifest.json")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        open_artifact(tmp_path)


def test_a_newer_artifact_is_refused_before_anything_else_is_judged(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedSchemaError, match=f"schema version {SCHEMA_VERSION + 1}"):
        open_artifact(folder)


def test_an_edited_manifest_is_seen(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"loss": 1.5', '"loss": 0.5'))
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json is not what was written"):
        read_manifest(folder)
    manifest = Manifest.from_json(path.read_bytes().replace(b'"loss": 0.5', b'"loss": 1.5'), source="repaired")
    assert manifest.metrics == {"loss": 1.5}


def test_one_name_in_two_files_is_refused(tmp_path):
    for name in ("one", "two"):
        write_tensor_file(tmp_path / name, {"weight": torch.zeros(2)})
    with pytest.raises(CorruptArtifactError, match=r"'weight' of .*two stands in another file"):
        read_tensors([tmp_path / "one", tmp_path / "two"])


def test_without_verification_a_truncated_file_is_still_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptArtifactError, match="not a whole safetensors file"):
        open_artifact(folder, verify=False).tensors()
