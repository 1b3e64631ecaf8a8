"""Headers are read as the library reads them, and bad files are named."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from deepseek.compat.headers import INDEX_NAME, read_checkpoint, read_header
from deepseek.core.errors import ArtifactError, CorruptArtifactError

GOOD = save({"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)})


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x01\x02", "truncated"),
        (GOOD[:-1], "copy it again"),
        (GOOD[:20], "truncated"),
        (GOOD + b"\x00", "copy it again"),
        (struct.pack("<Q", 2**63) + b"{}", "announces a header of 9223372036854775808"),
        (struct.pack("<Q", 2) + b"[]", "expected a JSON object, found list"),
        (struct.pack("<Q", 1) + b"\xff", "not JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
        (with_header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\x00" * 8), "does not fit"),
        (with_header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\x00" * 4), "does not fit"),
        (with_header({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 4), "known dtype"),
        (with_header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\x00" * 4), "known dtype"),
        (with_header({"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}}, b"\x00" * 4), "known dtype"),
        (with_header({"w": 3}), "known dtype"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=message):
        read_header(path)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused_and_never_crash(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = {name: place.read() for name, place in read_header(path).items()}
    except CorruptArtifactError:
        return
    expected = load_file(path)
    assert tensors.keys() == expected.keys()
    for name, each in expected.items():
        assert tensors[name].reshape(-1).view(torch.uint8).tolist() == each.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"w": "missing.safetensors"}, "which is missing"),
        ({"w": "../in.safetensors"}, "expected a file beside it"),
        ({"w": 3}, "expected a file beside it"),
        ([], "expected a JSON object"),
    ],
)
def test_a_bad_index_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptArtifactError, match=message):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CorruptArtifactError, match=r"w stands in b\.safetensors and in a\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_folder_without_weights_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no safetensors file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": {"b": 1}}}, "names the file"),
        ({"weight_map": {"a": None}}, "names the file"),
        ({"weight_map": {"a": "../w.safetensors"}}, "names the file"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing"),
        ({"weight_map": {"a": "folder.safetensors"}}, "missing"),
    ],
)
def test_an_index_of_anything_but_files_beside_it_is_refused(tmp_path: Path, index: object, words: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CorruptArtifactError, match=words):
        read_checkpoint(tmp_path)


def test_an_index_without_an_end_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).symlink_to("/dev/zero")
    with pytest.raises(CorruptArtifactError, match="no file of at most"):
        read_checkpoint(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    os.mkfifo(tmp_path / INDEX_NAME)
    with pytest.raises(CorruptArtifactError, match="no file of at most"):
        read_checkpoint(tmp_path)
