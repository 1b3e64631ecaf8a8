import hashlib
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.artifact.format import Description
from deepseek.artifact.reading import open_artifact
from deepseek.artifact.verifying import is_pickle, measure_files
from deepseek.artifact.writing import write_artifact, write_tensor_file
from deepseek.core.errors import CorruptArtifactError, UnsafeFileError

DESCRIPTION = Description(architecture="decoder", architecture_config={})


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def folder(tmp_path):
    tensors = {"weight": torch.arange(12.0)}
    write_artifact(tmp_path / "model", tensors, DESCRIPTION, files={"config.json": b"{}", "tokenizer.json": b"[]"})
    return tmp_path / "model"


def test_records_are_what_hashlib_says(folder):
    records = measure_files(folder)
    assert set(records) == {"manifest.json", "model.safetensors", "config.json", "tokenizer.json"}
    for name, record in records.items():
        content = (folder / name).read_bytes()
        assert (record.sha256, record.num_bytes) == (hashlib.sha256(content).hexdigest(), len(content))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    name=st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"]),
    position=st.integers(min_value=0),
    bit=st.integers(0, 7),
)
def test_one_flipped_bit_anywhere_is_found_and_its_file_named(folder, name, position, bit):
    whole = (folder / name).read_bytes()
    damaged = bytearray(whole)
    damaged[position % len(whole)] ^= 1 << bit
    (folder / name).write_bytes(damaged)
    try:
        with pytest.raises(CorruptArtifactError, match=rf"{name} is not the file that was written"):
            open_artifact(folder)
    finally:
        (folder / name).write_bytes(whole)
    open_artifact(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors is truncated \(\d+ bytes"):
        open_artifact(folder)


def test_a_grown_file_is_named(folder):
    with (folder / "config.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(CorruptArtifactError, match=r"config\.json is longer"):
        open_artifact(folder)


def test_a_missing_file_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CorruptArtifactError, match=r"tokenizer\.json is missing"):
        open_artifact(folder)


def test_a_weight_file_that_nobody_listed_is_refused(folder):
    write_tensor_file(folder / "model-00002-of-00002.safetensors", {"weight": torch.zeros(1)})
    with pytest.raises(CorruptArtifactError, match="does not list"):
        open_artifact(folder)


def test_a_pickle_put_beside_an_artifact_is_refused(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin"):
        open_artifact(folder)


def test_notes_beside_an_artifact_are_left_alone(folder):
    (folder / "README.md").write_text("a model")
    open_artifact(folder)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.pkl", "model.ckpt", "model", "model.st"])
@pytest.mark.parametrize("protocol", [2, 5, "torch"])
def test_a_pickle_offered_as_a_model_is_refused_and_not_run(tmp_path, name, protocol):
    path, trace = tmp_path / name, tmp_path / "it-ran"
    if protocol == "torch":
        torch.save({"weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace), protocol=protocol))
    with pytest.raises(UnsafeFileError, match="pickle"):
        open_artifact(path)
    assert not trace.exists()


def test_a_folder_with_only_pickles_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin is a pickle"):
        open_artifact(tmp_path)


def test_a_pickle_named_safetensors_is_refused(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [0.0] * 9}))
    with pytest.raises(UnsafeFileError, match="pickle with the name of a safetensors file"):
        open_artifact(folder, verify=False).tensors()


def test_no_safetensors_header_is_taken_for_a_pickle(tmp_path):
    # Headers of every length: among them 640 bytes, whose length field starts with a pickle's first two bytes.
    starts = set()
    for length in range(1, 1200):
        path = tmp_path / "model.safetensors"
        write_tensor_file(path, {"x" * length: torch.zeros(1)})
        starts.add(path.read_bytes()[:2])
        assert not is_pickle(path)
    assert b"\x80\x02" in starts
