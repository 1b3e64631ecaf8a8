import errno
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch

from deepseek.checkpoint import saving
from deepseek.checkpoint.restoring import newest_valid
from deepseek.checkpoint.saving import save
from deepseek.core.errors import CheckpointError, ConfigError, StorageError


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def make_state(step):
    return {"step": step, "weight": torch.full((1000,), float(step))}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_tensors_are_readable_by_anybody_under_their_own_names(tmp_path):
    path = save(tmp_path, 7, {"model": {"layers.0.weight": torch.ones(2)}})
    assert path == tmp_path / "step-00000007"
    stored = safetensors.torch.load_file(path / "state.safetensors")
    torch.testing.assert_close(stored, {"model.layers.0.weight": torch.ones(2)}, rtol=0, atol=0)


def test_only_the_newest_stay(tmp_path):
    for step in (100, 200, 300, 400):
        save(tmp_path, step, make_state(step), keep=2)
    assert names(tmp_path) == ["step-00000300", "step-00000400"]


def test_a_visibly_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    save(tmp_path, 100, make_state(100), keep=2)
    damaged = save(tmp_path, 200, make_state(200), keep=2)
    with (damaged / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    save(tmp_path, 300, make_state(300), keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00000200", "step-00000300"]
    save(tmp_path, 400, make_state(400), keep=2)
    assert names(tmp_path) == ["step-00000300", "step-00000400"]


def test_the_checkpoint_just_written_stays_though_a_later_damaged_one_exists(tmp_path):
    flip(save(tmp_path, 300, make_state(300), keep=1) / "state.safetensors")
    save(tmp_path, 250, make_state(250), keep=1)
    assert names(tmp_path) == ["step-00000250", "step-00000300"]
    with pytest.warns(UserWarning, match="step-00000300"):
        assert newest_valid(tmp_path).step == 250


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 100, {"value": 1})
    save(tmp_path, 100, {"value": 2})
    assert newest_valid(tmp_path).state == {"value": 2}
    assert names(tmp_path) == ["step-00000100"]


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "step-notes.txt").write_text("mine")
    (tmp_path / "step-00000001x").mkdir()
    (tmp_path / ".hidden.tmp").mkdir()
    for step in (1, 2):
        save(tmp_path, step, make_state(step), keep=1)
    assert names(tmp_path) == [".hidden.tmp", "step-00000001x", "step-00000002", "step-notes.txt"]


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (1, 0)])
def test_impossible_numbers_are_refused(tmp_path, step, keep):
    with pytest.raises(ConfigError):
        save(tmp_path, step, {}, keep=keep)
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [object(), torch.empty(2, device="meta"), torch.eye(2).to_sparse()])
def test_a_value_that_cannot_be_kept_leaves_no_trace(tmp_path, value):
    save(tmp_path, 1, make_state(1))
    with pytest.raises(CheckpointError):
        save(tmp_path, 2, {"value": value}, keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_refusing_disk_leaves_the_previous_checkpoint_and_nothing_half_written(tmp_path, monkeypatch):
    save(tmp_path, 100, make_state(100), keep=1)

    def write_half(path, tensors):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(saving, "write_tensor_file", write_half)
    with pytest.raises(StorageError, match=r"step-00000200 cannot be written: the disk is full"):
        save(tmp_path, 200, make_state(200), keep=1)
    assert names(tmp_path) == ["step-00000100"]
    assert newest_valid(tmp_path).state["weight"].sum() == 100 * 1000


def test_a_folder_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match=r"checkpoints.*is a file"):
        save(tmp_path / "checkpoints", 1, {})


SAVE_UNTIL_REFUSED = textwrap.dedent("""
    import resource, sys
    import torch
    from deepseek.checkpoint.saving import save
    from deepseek.core.errors import StorageError
    folder, file_limit_bytes = sys.argv[1], int(sys.argv[2])
    save(folder, 100, {"weight": torch.full((1000,), 100.0)}, keep=1)
    if file_limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, file_limit_bytes))
    try:
        save(folder, 200, {"weight": torch.zeros(2_000_000)}, keep=1)
    except (StorageError, OSError) as error:
        print(type(error).__name__, error)
""")


def run_until_refused(folder, file_limit_bytes):
    command = [sys.executable, "-c", SAVE_UNTIL_REFUSED, str(folder), str(file_limit_bytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte where this user may mount one, and None elsewhere."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    is_mounted = mount is not None and subprocess.run([mount, *options], capture_output=True).returncode == 0
    yield folder if is_mounted else None
    if is_mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_leaves_the_previous_checkpoint(tmp_path, small_disk):
    # Where nothing can be mounted, a limit on the size of a file refuses the same bytes through the same system call.
    folder = small_disk or tmp_path
    seen = run_until_refused(folder / "checkpoints", 0 if small_disk else 1_000_000)
    assert "Error" in seen
    if small_disk:
        assert f"StorageError {folder / 'checkpoints' / 'step-00000200'} cannot be written: the disk is" in seen
    assert names(folder / "checkpoints") == ["step-00000100"]
    assert newest_valid(folder / "checkpoints").state["weight"].sum() == 100 * 1000


def test_a_file_size_limit_leaves_the_previous_checkpoint(tmp_path):
    assert "Error" in run_until_refused(tmp_path, 1_000_000)
    assert names(tmp_path) == ["step-00000100"]
    assert newest_valid(tmp_path).step == 100


SAVE_AND_STOP = textwrap.dedent("""
    import os, signal, sys
    import torch
    from deepseek.checkpoint import layout, saving
    from deepseek.core import storage
    folder, moment, last_step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    def die(*args, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)
    saving.save(folder, 100, {"value": 100, "weight": torch.zeros(10)}, keep=1)
    module, name = moment.split(":")
    setattr({"saving": saving, "os": os, "storage": storage}[module], name, die)
    saving.save(folder, last_step, {"value": last_step, "weight": torch.ones(10)}, keep=1)
""")


@pytest.mark.parametrize("moment", ["saving:write_tensor_file", "saving:measure_files", "os:fsync", "os:replace"])
def test_a_kill_at_each_moment_of_a_save_leaves_the_previous_checkpoint(tmp_path, moment):
    done = subprocess.run([sys.executable, "-c", SAVE_AND_STOP, str(tmp_path), moment, "200"])
    assert done.returncode == -signal.SIGKILL
    assert newest_valid(tmp_path).step == 100
    save(tmp_path, 300, make_state(300), keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00000300"]  # the remains of 200 are gone


def test_a_kill_before_pruning_leaves_both(tmp_path):
    done = subprocess.run([sys.executable, "-c", SAVE_AND_STOP, str(tmp_path), "saving:list_checkpoints", "200"])
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["step-00000100", "step-00000200"]
    assert newest_valid(tmp_path).state["value"] == 200


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    path = save(tmp_path, 100, {"value": 1})
    shutil.copytree(path, tmp_path / ".step-00000100.1a2b3c4d.tmp")
    path.rename(tmp_path / ".step-00000100.1a2b3c4d.old")
    assert newest_valid(tmp_path).state == {"value": 1}
    save(tmp_path, 200, {"value": 2}, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00000200"]


def test_looking_for_a_checkpoint_disturbs_no_save_that_goes_on(tmp_path):
    save(tmp_path, 100, {"value": 1})
    (tmp_path / ".step-00000200.1a2b3c4d.tmp").mkdir()
    assert newest_valid(tmp_path).step == 100
    assert names(tmp_path) == [".step-00000200.1a2b3c4d.tmp", "step-00000100"]


def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    save(tmp_path, 100, make_state(100), keep=1)

    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "measure_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 200, make_state(200), keep=1)
    assert names(tmp_path) == ["step-00000100"]


def test_a_kill_after_a_replacement_leaves_the_new_one(tmp_path):
    path = save(tmp_path, 100, {"value": 1})
    shutil.copytree(path, tmp_path / ".step-00000100.1a2b3c4d.old")
    save(tmp_path, 100, {"value": 2})
    assert newest_valid(tmp_path).state == {"value": 2}
    assert names(tmp_path) == ["step-00000100"]
