"""Compiled code on disk: found again by another process, and nothing is trusted that this user did not write."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepseek.compiler.dynamic_shapes import compiled_cache
from deepseek.compiler.dynamic_shapes.compiled_cache import (
    CompiledCacheWarning,
    CompiledStore,
    _make_private,
    _pack,
    _place_libraries,
    _read_key,
    _unpack,
    digest_of,
    find_compiled_folder,
)

ARTIFACTS, LIBRARIES = b"artifacts" * 99, {"cabcdefghijk.main.so": b"library", "cdefabcghijk.so": b""}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "compiled"
    _make_private(path)
    return path


def test_the_folder_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    assert find_compiled_folder() == tmp_path / "compiled"
    monkeypatch.delenv("DEEPSEEK_CACHE_DIR")
    assert find_compiled_folder().is_relative_to(Path.home())


def test_what_is_packed_is_unpacked(folder):
    key = _read_key(folder)
    assert _unpack(_pack(ARTIFACTS, LIBRARIES, key), key) == (ARTIFACTS, LIBRARIES)


def test_a_changed_byte_anywhere_is_seen(folder):
    key = _read_key(folder)
    content = _pack(ARTIFACTS, LIBRARIES, key)
    for place in (0, 21, 40, len(content) // 2, len(content) - 40, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        with pytest.raises(ValueError, match="damaged"):
            _unpack(bytes(changed), key)
    for length in (0, 10, 100, len(content) - 1):
        with pytest.raises(ValueError, match="damaged"):
            _unpack(content[:length], key)


def test_another_users_bundle_is_refused(folder, tmp_path):
    foreign = tmp_path / "foreign"
    _make_private(foreign)
    with pytest.raises(ValueError, match="not written by this user"):
        _unpack(_pack(ARTIFACTS, LIBRARIES, _read_key(foreign)), _read_key(folder))


def test_the_key_is_made_once_and_is_private(folder):
    assert _read_key(folder) == _read_key(folder)
    assert (folder / "key").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["key"]


@pytest.fixture
def untouchable(monkeypatch):
    """torch is not to see anything that was refused."""

    def refuse(*_):
        raise AssertionError("untrusted bytes were handed on")

    monkeypatch.setattr(compiled_cache, "_hand_to_torch", refuse)
    monkeypatch.setattr(compiled_cache, "_place_libraries", refuse)


def write_bundle(store, folder):
    store.path.write_bytes(_pack(ARTIFACTS, LIBRARIES, _read_key(folder)))
    store.path.chmod(0o600)


def damage(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def replace_by_link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.chmod(0o644), "open to others"),
        (lambda path: path.parent.chmod(0o777), "open to others"),
        (replace_by_link, "is a link"),
        (lambda path: (path.parent / "key").chmod(0o644), "open to others"),
        (lambda path: (path.parent / "key").write_bytes(b"short"), "delete the folder"),
    ],
)
def test_an_entry_that_cannot_be_trusted_is_ignored_with_a_warning(folder, untouchable, spoil, message):
    store = CompiledStore("0" * 64, folder)
    write_bundle(store, folder)
    spoil(store.path)
    with pytest.warns(CompiledCacheWarning, match=message):
        assert store.load() == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_ignored(folder, untouchable):
    store = CompiledStore("0" * 64, folder)
    write_bundle(store, folder)
    os.chown(store.path, 12345, 12345)
    with pytest.warns(CompiledCacheWarning, match="belongs to another user"):
        assert store.load() == 0


def test_no_entry_is_no_event(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CompiledStore("0" * 64, tmp_path / "nowhere").load() == 0


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setattr(compiled_cache, "_collect_artifacts", lambda: ARTIFACTS)
    monkeypatch.setattr(compiled_cache, "_collect_libraries", lambda: {})
    store = CompiledStore("0" * 64, tmp_path / "file" / "compiled")
    with pytest.warns(CompiledCacheWarning, match="not kept"):
        assert not store.save()
    assert not store.save()  # said once


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_warning(folder, monkeypatch):
    monkeypatch.setattr(compiled_cache, "_collect_artifacts", lambda: ARTIFACTS)
    monkeypatch.setattr(compiled_cache, "_collect_libraries", lambda: {})
    folder.chmod(0o500)
    with pytest.warns(CompiledCacheWarning, match="may not write"):
        assert not CompiledStore("0" * 64, folder).save()


def test_writers_at_once_leave_one_whole_entry(folder, monkeypatch):
    """Each writer's bundle is whole whichever is last, and all of them share the first one's key."""
    monkeypatch.setattr(compiled_cache, "_collect_libraries", lambda: {})
    monkeypatch.setattr(compiled_cache, "_collect_artifacts", lambda: os.urandom(200_000))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: CompiledStore("0" * 64, folder).save(), range(24)))
    artifacts, _ = _unpack((folder / f"{'0' * 64}.bundle").read_bytes(), _read_key(folder))
    assert len(artifacts) == 200_000
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".bundle"]


def test_only_libraries_with_torchs_own_names_are_placed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    name = "cabcdefghijk.main.so"
    _place_libraries({name: b"good", "../../evil.so": b"bad", "plain.txt": b"bad"})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]
    _place_libraries({name: b"later"})
    assert (tmp_path / "ab" / name).read_bytes() == b"good"


def test_the_digest_follows_the_parts_and_the_machine(monkeypatch):
    assert digest_of("a", "b") == digest_of("a", "b")
    assert digest_of("a", "b") != digest_of("ab")
    before = digest_of("a")
    monkeypatch.setattr(compiled_cache, "_processor_flags", lambda: "another processor")
    assert digest_of("a") != before


PROGRAM = """
import sys, torch
from deepseek.compiler.dynamic_shapes.dynamic_graph import dynamic_graph

@dynamic_graph
def score(x):
    return torch.tanh(x * 2 + 1).sum(dim=-1)

for length in (5, 9, 12):
    x = torch.randn(3, length, requires_grad=True)
    score(x).sum().backward()
    plain = x.detach().clone().requires_grad_()
    torch.tanh(plain * 2 + 1).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
explanation = score.explain()
print(len(explanation.compilations), explanation.num_cache_hits, explanation.num_loaded)
"""


def start(tmp_path, name):
    environment = os.environ | {
        "DEEPSEEK_CACHE_DIR": str(tmp_path / "deepseek"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name),
    }
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return [int(each) for each in out.split()]


@pytest.mark.slow
def test_two_processes_at_once_leave_an_entry_that_a_third_one_uses(tmp_path):
    for process in [start(tmp_path, "first"), start(tmp_path, "second")]:
        assert finish(process)[0] == 1
    (bundle,) = (tmp_path / "deepseek" / "compiled").glob("*.bundle")
    num_compilations, num_hits, num_loaded = finish(start(tmp_path, "third"))
    assert (num_compilations, num_hits) == (1, 1)
    assert num_loaded >= 1
    assert not list(bundle.parent.glob(".*tmp"))
    placed = list((tmp_path / "third").rglob("*.main.so"))
    compiled = {path.name for path in (tmp_path / "first").rglob("*.main.so")}
    assert {path.name for path in placed} == compiled != set()
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in placed)  # the linker leaves 0755
