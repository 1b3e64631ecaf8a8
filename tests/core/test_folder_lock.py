"""A folder belongs to one run, for as long as its process lives and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.core.errors import StorageError
from deepseek.core.folder_lock import LOCK_FILE, locked_folder

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom deepseek.core.folder_lock import locked_folder\n"
    "with locked_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds `folder` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_block_makes_its_folder_and_leaves_no_file(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_FILE).exists()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_error_in_the_block_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked_folder(tmp_path):
        raise KeyError
    with locked_folder(tmp_path):
        pass


def test_a_second_run_is_told_whose_the_folder_is(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        message = rf"is being written by process {process.pid} on \S+ since .*choose"
        with pytest.raises(StorageError, match=message), locked_folder(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
        process.communicate()
    assert process.returncode == 0
    with locked_folder(tmp_path):
        pass


def test_two_blocks_of_one_process_are_two_runs(tmp_path: Path) -> None:
    own = pytest.raises(StorageError, match=f"process {os.getpid()} on")
    with locked_folder(tmp_path), own, locked_folder(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with locked_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_of_many_runs_at_once_one_has_the_folder(tmp_path: Path) -> None:
    """Each takes and releases the lock many times; nobody is ever inside together with another."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom deepseek.core.errors import StorageError\n"
        "from deepseek.core.folder_lock import locked_folder\nfolder, count = Path(sys.argv[1]), 0\n"
        "while count < 100:\n"
        "    try:\n"
        "        with locked_folder(folder / 'run'):\n"
        "            (folder / 'inside').mkdir()\n            (folder / 'inside').rmdir()\n            count += 1\n"
        "    except StorageError:\n        pass\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == ["", "", ""]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), locked_folder(tmp_path / "file" / "run"):
        pass
