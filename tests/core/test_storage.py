import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core import storage
from deepseek.core.errors import StorageError, TemporaryError
from deepseek.core.storage import explained_storage, new_folder, sha256_of, write_file

names = st.text("abc", min_size=1, max_size=3)


def fill(folder, content):
    """Two files that belong together, one of them further down."""
    (folder / "deep").mkdir()
    (folder / "one").write_text(content)
    (folder / "deep" / "two").write_text(content)


def read(folder):
    return {str(each.relative_to(folder)): each.read_text() for each in folder.rglob("*") if each.is_file()}


def entries(folder):
    return sorted(each.name for each in folder.iterdir())


def whole(content):
    return {"one": content, "deep/two": content}


def raise_error(*_):
    raise OSError(errno.EIO, "Input/output error")


class TestNewFolder:
    def test_it_appears_when_the_block_ends_and_not_before(self, tmp_path):
        path = tmp_path / "a" / "b"
        with new_folder(path) as temporary:
            fill(temporary, "new")
            assert not path.exists() and temporary.parent == path.parent
        assert read(path) == whole("new") and entries(path.parent) == ["b"]

    @settings(deadline=None, max_examples=20)
    @given(old=st.dictionaries(names, st.binary(max_size=9)), new=st.dictionaries(names, st.binary(max_size=9)))
    def test_an_older_folder_is_readable_until_then_and_wholly_replaced(self, tmp_path_factory, old, new):
        path = tmp_path_factory.mktemp("storage") / "model"
        for content, before in ((old, None), (new, old)):
            with new_folder(path) as temporary:
                for name, value in content.items():
                    (temporary / name).write_bytes(value)
                assert before is None or {each.name: each.read_bytes() for each in path.iterdir()} == before
            assert {each.name: each.read_bytes() for each in path.iterdir()} == content
        assert entries(path.parent) == ["model"]

    @pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError(errno.EIO, "mine")])
    def test_an_exception_leaves_what_was_there_and_nothing_else(self, tmp_path, error):
        path = tmp_path / "model"
        with new_folder(path) as temporary:
            fill(temporary, "old")
        with pytest.raises(type(error)) as caught, new_folder(path) as temporary:
            fill(temporary, "new")
            raise error
        assert caught.value is error
        assert read(path) == whole("old") and entries(tmp_path) == ["model"]

    def test_an_exception_leaves_nothing_where_nothing_was(self, tmp_path):
        with pytest.raises(ValueError, match="mine"), new_folder(tmp_path / "model"):
            raise ValueError("mine")
        assert entries(tmp_path) == []

    @pytest.mark.parametrize("can_exchange", [True, False])
    @pytest.mark.parametrize("step", ["_flush", "replace"])
    def test_a_failure_of_the_device_at_the_end_leaves_what_was_there(self, tmp_path, monkeypatch, can_exchange, step):
        path = tmp_path / "model"
        with new_folder(path) as temporary:
            fill(temporary, "old")
        if not can_exchange:
            monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
        elif step == "replace":
            monkeypatch.setattr(storage, "_exchange", raise_error)
        replace = os.replace
        calls = []

        def fail_once_the_old_one_is_aside(source, target):
            calls.append(target)
            (raise_error if len(calls) == 2 else replace)(source, target)

        with pytest.raises(OSError, match="Input/output"), new_folder(path) as temporary:
            fill(temporary, "new")
            if step == "_flush":
                monkeypatch.setattr(storage, "_flush", raise_error)
            else:
                monkeypatch.setattr(os, "replace", fail_once_the_old_one_is_aside)
        assert read(path) == whole("old") and entries(tmp_path) == ["model"]

    def test_without_an_exchange_the_old_folder_is_replaced_all_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
        for content in ("old", "new"):
            with new_folder(tmp_path / "model") as temporary:
                fill(temporary, content)
        assert read(tmp_path / "model") == whole("new") and entries(tmp_path) == ["model"]

    def test_everything_is_flushed_before_the_rename(self, tmp_path, monkeypatch):
        flushed = []
        fsync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: (flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))
        )
        with new_folder(tmp_path / "model") as temporary:
            fill(temporary, "new")
            place = str(temporary)
        assert set(flushed[:-1]) == {place, f"{place}/deep", f"{place}/one", f"{place}/deep/two"}
        assert flushed[-1] == str(tmp_path)

    def test_a_link_is_followed(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk")
        (tmp_path / "later").symlink_to(tmp_path / "not yet")
        for content in ("old", "new"):
            for link in ("link", "later"):
                with new_folder(tmp_path / link) as temporary:
                    fill(temporary, content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "later").is_symlink()
        assert read(tmp_path / "disk") == read(tmp_path / "not yet") == whole("new")
        assert entries(tmp_path) == ["disk", "later", "link", "not yet"]

    def test_a_folder_named_relative_to_the_current_one(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with new_folder(Path("model")) as temporary:
            fill(temporary, "new")
        assert read(tmp_path / "model") == whole("new")

    def test_a_file_in_the_way_is_not_replaced(self, tmp_path):
        (tmp_path / "model").write_text("mine")
        with (
            pytest.raises(StorageError, match="model cannot be written: a file is in the way; move it or choose"),
            new_folder(tmp_path / "model"),
        ):
            pytest.fail("the block must not be entered")
        assert (tmp_path / "model").read_text() == "mine" and entries(tmp_path) == ["model"]

    def test_a_file_of_somebody_else_that_is_missing_is_not_called_a_full_disk(self, tmp_path):
        (tmp_path / "out").mkdir()
        with pytest.raises(FileNotFoundError, match="corpus") as caught, new_folder(tmp_path / "out" / "model"):
            (tmp_path / "corpus").read_bytes()
        assert not isinstance(caught.value, StorageError) and entries(tmp_path / "out") == []


class TestWriteFile:
    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.binary(max_size=99), min_size=1, max_size=3))
    def test_the_last_content_is_there(self, tmp_path_factory, contents):
        path = tmp_path_factory.mktemp("storage") / "deep" / "file"
        for content in contents:
            write_file(path, content)
            assert path.read_bytes() == content
        assert entries(path.parent) == ["file"]

    def test_a_failure_leaves_the_old_content_and_nothing_else(self, tmp_path, monkeypatch):
        write_file(tmp_path / "file", b"old")
        monkeypatch.setattr(storage, "_flush", raise_error)
        with pytest.raises(OSError, match="Input/output"):
            write_file(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old" and entries(tmp_path) == ["file"]

    def test_a_folder_in_the_way_is_not_replaced(self, tmp_path):
        (tmp_path / "model").mkdir()
        with pytest.raises(StorageError, match="this path is a folder, not a file"):
            write_file(tmp_path / "model", b"new")
        assert entries(tmp_path) == ["model"] and entries(tmp_path / "model") == []


def make_folder(path):
    with new_folder(path):
        pass


def make_file(path):
    write_file(path, b"content")


@pytest.mark.parametrize("make", [make_folder, make_file])
class TestRefusals:
    def test_a_part_of_the_path_that_is_a_file(self, tmp_path, make):
        (tmp_path / "file").write_text("mine")
        for path in (tmp_path / "file" / "model", tmp_path / "file" / "deep" / "model"):
            with pytest.raises(StorageError, match=r"model cannot be written: .*; choose another path$"):
                make(path)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_place_that_does_not_exist_and_cannot_be_made(self, make):
        with pytest.raises(StorageError, match=r"/proc/no/model cannot be written: there is no such place"):
            make(Path("/proc/no/model"))

    def test_a_name_that_is_too_long(self, tmp_path, make):
        with pytest.raises(StorageError, match="its name is too long for this file system"):
            make(tmp_path / ("x" * 300))
        assert entries(tmp_path) == []

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            (errno.ENOSPC, "the disk is full; free some space or choose another folder"),
            (errno.EDQUOT, "the disk quota is used up; free some space or choose another folder"),
            (errno.EROFS, "the file system is read-only; choose another folder"),
            (errno.EACCES, "this user may not write there; choose another folder or change its owner"),
        ],
    )
    def test_a_disk_that_refuses_is_one_sentence_and_may_be_tried_again(
        self, tmp_path, monkeypatch, make, code, reason
    ):
        def refuse(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError) as caught:
            make(tmp_path / "model")
        assert caught.value.strerror == f"{tmp_path / 'model'} cannot be written: {reason}"
        assert caught.value.errno == code and isinstance(caught.value, TemporaryError)
        assert entries(tmp_path) == []

    def test_a_folder_without_write_permission(self, tmp_path, make):
        place = tmp_path / "closed"
        place.mkdir(mode=0o500)
        code = textwrap.dedent(f"""
            import os, sys
            if os.getuid() == 0:
                os.setgid(65534), os.setuid(65534)  # root may write anywhere
            try:
                {make.__name__}(Path({str(place / "model")!r}))
            except StorageError as error:
                print(error.strerror)
        """)
        imports = "from pathlib import Path\nfrom deepseek.core.errors import StorageError\n"
        source = imports + "from deepseek.core.storage import new_folder, write_file\n" + DEFINITIONS + code
        for parent in [place, *place.parents][:-2]:
            parent.chmod(parent.stat().st_mode | 0o055)
        answer = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
        assert answer.stdout.strip() == (
            f"{place / 'model'} cannot be written: "
            "this user may not write there; choose another folder or change its owner"
        ), answer.stderr
        assert entries(place) == []


DEFINITIONS = """
def make_folder(path):
    with new_folder(path):
        pass

def make_file(path):
    write_file(path, b"content")
"""


def test_only_refusals_are_explained():
    with pytest.raises(OSError, match="Input/output") as caught, explained_storage(Path("x")):
        raise_error()
    assert not isinstance(caught.value, StorageError)


def test_an_explained_error_is_not_explained_again(tmp_path):
    with pytest.raises(StorageError, match=r"^first$"), explained_storage(tmp_path / "outer"):
        raise StorageError("first")


WRITER = """
import sys
from pathlib import Path
from deepseek.core.storage import new_folder
version = 0
while True:
    version += 1
    with new_folder(Path(sys.argv[1])) as temporary:
        for name in ("one", "two", "three"):
            (temporary / name).write_text(str(version) * 1000)
    print(version, flush=True)
"""


def test_a_kill_at_any_moment_leaves_one_whole_folder(tmp_path):
    path = tmp_path / "model"
    rng = random.Random(0)
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(3):
                assert writer.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
        contents = {each.name: each.read_text() for each in path.iterdir()}
        assert set(contents) == {"one", "two", "three"} and len(set(contents.values())) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from deepseek.core import storage
from deepseek.core.storage import new_folder
countdown = int(sys.argv[2])
def dying(function):
    def call(*arguments, **keywords):
        global countdown
        answer = function(*arguments, **keywords)
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    return call
for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
storage._exchange = dying(storage._exchange)
with new_folder(Path(sys.argv[1])) as temporary:
    (temporary / "one").write_text("new")
    (temporary / "two").write_text("new")
print("done")
"""


def test_a_kill_after_each_call_to_the_system_leaves_the_old_folder_or_the_new_one(tmp_path):
    path = tmp_path / "model"
    seen = []
    for countdown in range(1, 99):
        with new_folder(path) as temporary:
            (temporary / "one").write_text("old")
            (temporary / "two").write_text("old")
        answer = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(countdown)], capture_output=True, text=True, check=False
        )
        if "done" in answer.stdout:
            break
        assert answer.returncode == -signal.SIGKILL, answer.stderr
        contents = {each.name: each.read_text() for each in path.iterdir()}
        assert set(contents) == {"one", "two"} and len(set(contents.values())) == 1
        seen.append(contents["one"])
        assert all(each.startswith(".model.") for each in entries(tmp_path) if each != "model")
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


@given(st.binary(max_size=5000))
@settings(deadline=None, max_examples=20)
def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(content * 200)
    assert sha256_of(path) == hashlib.sha256(content * 200).hexdigest()
