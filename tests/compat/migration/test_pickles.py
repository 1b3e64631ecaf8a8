"""Pickles are judged by their opcodes and never run."""

from __future__ import annotations

import contextlib
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek.compat.migration.applying import migrate
from deepseek.compat.migration.pickles import PickleContent, read_pickle
from deepseek.core.errors import CorruptArtifactError
from tests.compat.migration.checks import (
    Evil,
    found,
)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_named_and_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = {"w": [1.0], "x": Evil(f"touch {marker}")}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(payload, protocol))
    torch.save(payload, tmp_path / "zipped.pt")
    torch.save(payload, tmp_path / "older.bin", _use_new_zipfile_serialization=False)
    findings = found(tmp_path)
    assert [each.rule for each in findings] == ["checkpoint-malicious"] * 3
    assert all("system" in each.why for each in findings)
    left = migrate(tmp_path, tmp_path.parent / f"out-{protocol}-{tmp_path.name}", "v5.0")
    assert [each.rule for each in left] == ["checkpoint-malicious"] * 3
    assert not marker.exists()


def test_names_hidden_in_the_memo_or_the_stack_are_not_trusted(tmp_path: Path) -> None:
    hidden = [
        # "posix", "system" pushed early, harmless names pushed and popped, then STACK_GLOBAL.
        b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93)R.",
        # The two names come back from the memo.
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940" + b"0h\x00h\x01\x93)R.",
        b"\x80\x04cposix\nsystem\n)R.",
        b"(iposix\nsystem\n.",
    ]
    for number, content in enumerate(hidden):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(content)
        assert read_pickle(path).foreign, content


def test_an_archive_behind_a_pickle_does_not_hide_it(tmp_path: Path) -> None:
    harmless = io.BytesIO()
    torch.save({"w": torch.ones(1)}, harmless)
    (tmp_path / "both.pt").write_bytes(pickle.dumps(Evil("true")) + harmless.getvalue())
    assert [each.rule for each in found(tmp_path)] == ["checkpoint-malicious"]


def test_tensors_in_pickles_are_harmless(tmp_path: Path) -> None:
    state = OrderedDict(w=torch.ones(2), n=torch.ones(1, dtype=torch.int64), p=torch.nn.Parameter(torch.ones(1)))
    for number, is_new in enumerate((True, False)):
        torch.save(state, tmp_path / f"{number}.pt", _use_new_zipfile_serialization=is_new)
        assert read_pickle(tmp_path / f"{number}.pt").foreign == ()
    (tmp_path / "array.pkl").write_bytes(pickle.dumps({"a": numpy.ones(2)}))
    assert read_pickle(tmp_path / "array.pkl").foreign == ()


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x80\x04",
        b"hello",
        b"\x80\x02\x8e\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        zipped("a/data.pkl", b"\x80\x02.")[30:],
        zipped("x.txt", b""),
        zipped("a/data.pkl", b"\x80\x04"),
        zipped("a/data.pkl", bytes(65_000_000)),
    ],
    ids=["empty", "start", "cut", "text", "terabytes", "no front", "no pickle", "cut in a zip", "bomb"],
)
def test_what_is_no_pickle_is_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert [each.rule for each in found(tmp_path)] == ["unreadable"]


GOOD_PICKLE = pickle.dumps({"w": numpy.ones(3), "x": ["a", 1.5, ("b", None)]})


@settings(deadline=None, max_examples=300)
@given(
    change=st.one_of(
        st.binary(max_size=60),
        st.lists(st.tuples(st.integers(0, len(GOOD_PICKLE) - 1), st.integers(0, 255)), max_size=4),
    )
)
@example(change=b"\x80\x04X\xff\xff\xff\x7f")
def test_no_bytes_make_the_pickle_reader_crash(change: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(GOOD_PICKLE)
    if isinstance(change, bytes):
        content = bytearray(change)
    else:
        for at, byte in change:
            content[at] = byte
    path = tmp_path_factory.getbasetemp() / "fuzzed.pkl"
    path.write_bytes(content)
    with contextlib.suppress(CorruptArtifactError):
        read_pickle(path)


OLD_EXPLOIT = b"cposix\nsystem\n(S'true'\ntR."


def tarred(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        tarred(sys_info=pickle.dumps({}), pickle=pickle.dumps(Evil("true"))),
        tarred(storages=pickle.dumps(1, 0) + OLD_EXPLOIT, pickle=pickle.dumps({})),
        zipped("archive/DATA.PKL", pickle.dumps(Evil("true"))),
        zipped("a/data.pkl", pickle.dumps({})) + pickle.dumps(Evil("true")),
        pickle.dumps([1], 0) + OLD_EXPLOIT,
        pickle.dumps([1], 1) + OLD_EXPLOIT,
        pickle.dumps([1], 2) + OLD_EXPLOIT,
        OLD_EXPLOIT[:-1] + b"\xff\xff",
        OLD_EXPLOIT[:-1],
        pickle.dumps(Evil("true"))[:-1] + b"\xff",
        pickle.dumps(Evil("true"))[:-2],
        pickle.dumps({"a": bytes(3_000_000), "b": Evil("true")}),
        b"(iposix\nsystem\n\xff",
    ],
)
def test_an_exploit_is_one_in_every_container_and_with_any_tail(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    # Where the archive comes first, only what a loader of archives runs counts.
    expected = (
        "checkpoint-pickle"
        if content.startswith(b"PK") and b"posix" in content[-120:] and b"DATA" not in content
        else None
    )
    assert [each.rule for each in found(tmp_path)] == [expected or "checkpoint-malicious"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_every_kind_of_tensor_is_harmless(tmp_path: Path) -> None:
    dtypes = [
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.bfloat16,
    ]
    state: dict[str, Any] = {str(dtype): torch.zeros(2).to(dtype) for dtype in dtypes}
    state["quantised"] = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    state["channels"] = torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8)
    state["sparse"] = torch.eye(2).to_sparse()
    state["rows"] = torch.eye(2).to_sparse_csr()
    state |= {"size": torch.Size([1]), "dtype": torch.float32, "device": torch.device("cpu"), "set": {1}}
    for number, is_new in enumerate((True, False)):
        torch.save(state, tmp_path / f"{number}.pt", _use_new_zipfile_serialization=is_new)
        assert read_pickle(tmp_path / f"{number}.pt").foreign == ()


def test_nothing_that_we_call_harmless_is_refused_by_the_reader_of_torch() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed = set(_get_allowed_globals())
    ours = {name for name in allowed if PickleContent((name,)).foreign == ()}
    assert {"torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict", "torch.uint16"} <= ours
    assert PickleContent(("os.system", "torch.storage._load_from_bytes", "builtins.eval", "torch.load")).foreign == (
        "os.system",
        "torch.storage._load_from_bytes",
        "builtins.eval",
        "torch.load",
    )


def test_a_text_that_looks_like_a_name_is_no_exploit(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"cats\nand dogs\nare animals\n")
    assert found(tmp_path) == []


def test_a_pickle_of_endless_operations_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.compat.migration.pickles._MAX_OPCODES", 5000)
    (tmp_path / "x.pt").write_bytes(b"\x80\x02" + b"N0" * 3000 + b"N.")
    (finding,) = found(tmp_path)
    assert "more than 5000 operations" in finding.why
