import errno
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.artifact import writing
from deepseek.artifact.format import Description
from deepseek.artifact.reading import open_artifact
from deepseek.artifact.writing import split, write_artifact
from deepseek.core.errors import ArtifactError, ConfigError, StorageError

DESCRIPTION = Description(architecture="decoder", architecture_config={"num_layers": 2})


def make_tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.arange(6).reshape(2, 3).t(),
        "d": torch.tensor(2.5),
        "e": torch.empty(0, 3, dtype=torch.int8),
        "f": torch.randn(10)[2:5],
    }


def test_weights_are_plain_safetensors_with_the_other_files_beside_them(tmp_path):
    tensors = make_tensors()
    manifest = write_artifact(tmp_path / "model", tensors, DESCRIPTION, files={"tokenizer.json": b"{}"})
    stored = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    torch.testing.assert_close(stored, tensors, rtol=0, atol=0)
    assert {each.name for each in (tmp_path / "model").iterdir()} == {*manifest.files, "manifest.json"}
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == b"{}"


def test_large_weights_are_split_as_hugging_face_does(tmp_path):
    tensors = {f"layer.{index}": torch.full((100,), float(index)) for index in range(5)}
    write_artifact(tmp_path / "model", tensors, DESCRIPTION, max_shard_bytes=800)
    names = sorted(each.name for each in (tmp_path / "model").glob("*.safetensors"))
    assert names == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    for name, file_name in index["weight_map"].items():
        stored = safetensors.torch.load_file(tmp_path / "model" / file_name)
        torch.testing.assert_close(stored[name], tensors[name], rtol=0, atol=0)
    torch.testing.assert_close(open_artifact(tmp_path / "model").tensors(), tensors, rtol=0, atol=0)


@given(st.lists(st.integers(0, 30)), st.integers(1, 20))
def test_splitting_keeps_every_name_in_order_and_within_the_limit(sizes, limit):
    shards = split({str(index): size for index, size in enumerate(sizes)}, limit)
    assert [int(name) for shard in shards for name in shard] == list(range(len(sizes)))
    assert all(len(shard) == 1 or sum(sizes[int(name)] for name in shard) <= limit for shard in shards)


def test_two_writes_of_one_model_have_one_digest(tmp_path):
    first = write_artifact(tmp_path / "one", make_tensors(), DESCRIPTION)
    assert first.digest == write_artifact(tmp_path / "two", make_tensors(), DESCRIPTION).digest


def test_tied_tensors_are_refused_by_name(tmp_path):
    weight = torch.randn(4, 4)
    with pytest.raises(ArtifactError, match=r"'embed' and 'head' share memory"):
        write_artifact(tmp_path / "model", {"embed": weight, "head": weight.t()}, DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_tensors_that_cannot_be_stored_are_named(tmp_path, tensor, reason):
    with pytest.raises(ArtifactError, match=f"'weight'.*{reason}"):
        write_artifact(tmp_path / "model", {"weight": tensor}, DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_replaced_only_when_asked(tmp_path):
    write_artifact(tmp_path / "model", {"a": torch.zeros(2)}, DESCRIPTION, files={"old.txt": b"1"})
    with pytest.raises(ArtifactError, match="or ask for it to be overwritten"):
        write_artifact(tmp_path / "model", {"a": torch.ones(2)}, DESCRIPTION)
    assert open_artifact(tmp_path / "model").tensors()["a"].sum() == 0
    write_artifact(tmp_path / "model", {"a": torch.ones(2)}, DESCRIPTION, overwrite=True)
    artifact = open_artifact(tmp_path / "model")
    assert artifact.tensors()["a"].sum() == 2 and not artifact.has_file("old.txt")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="left alone"):
        write_artifact(tmp_path, {"a": torch.zeros(2)}, DESCRIPTION, overwrite=True)
    with pytest.raises(ArtifactError, match="is a file"):
        write_artifact(tmp_path / "thesis.tex", {"a": torch.zeros(2)}, DESCRIPTION, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["../x.json", "manifest.json", "extra.safetensors", "extra.bin"])
def test_extra_files_cannot_pose_as_weights_or_leave(tmp_path, name):
    with pytest.raises(ArtifactError, match=r"choose another name|plain file name"):
        write_artifact(tmp_path / "model", {"a": torch.zeros(2)}, DESCRIPTION, files={name: b""})


def test_a_shard_limit_below_one_byte_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        write_artifact(tmp_path / "model", {"a": torch.zeros(2)}, DESCRIPTION, max_shard_bytes=0)


def test_a_full_disk_leaves_the_old_artifact(tmp_path, monkeypatch):
    write_artifact(tmp_path / "model", {"a": torch.zeros(2)}, DESCRIPTION)

    def refuse(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "measure_files", refuse)
    with pytest.raises(StorageError, match=r"model cannot be written: the disk is full"):
        write_artifact(tmp_path / "model", {"a": torch.ones(2)}, DESCRIPTION, overwrite=True)
    assert open_artifact(tmp_path / "model").tensors()["a"].sum() == 0
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
