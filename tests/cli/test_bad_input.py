"""What users get wrong and disks refuse: one sentence with what was seen and what to do, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek.checkpoint.restoring import newest_valid
from tests.cli.commands import Finished, Result, as_options, assert_one_sentence, deepseek, start

Call = Callable[..., Result]


def files_in(folder: Path) -> list[str]:
    """Every file with something in it."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("verb", ["train", "quickstart"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "holds no file"), ("", "no document"), (" \n\t", "no document")],
    ids=["missing", "empty", "blank"],
)
def test_a_corpus_that_is_missing_or_empty(
    call: Call, tiny: dict[str, Any], tmp_path: Path, verb: str, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_text(content)
    before = files_in(tmp_path)
    settings = tiny | {"data.sources": [str(tmp_path / "text.txt")], "folder": str(tmp_path / "run")}
    recipe = ["quickstart"] if verb == "train" else []
    result = call(verb, *recipe, *as_options(settings), "--json")
    assert_one_sentence(result, 1, "text.txt", words)
    assert result.out == ""
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_step": 3}, ["unknown setting 'num_step'", "did you mean 'num_steps'"]),
        ({"model.num_layer": 3}, ["unknown setting 'model.num_layer'", "did you mean 'model.num_layers'"]),
        ({"model.moe.topk": 1}, ["unknown setting 'model.moe.topk'", "did you mean 'model.moe.top_k'"]),
        ({"optimizer.nonsense": 1}, ["unknown setting 'optimizer.nonsense'", "optimizer.weight_decay"]),
        ({"model.num_heads": 3}, ["num_heads=3 does not divide hidden_size=256", "choose one of 1, 2, 4"]),
        ({"model.num_kv_heads": 3}, ["num_kv_heads=3 does not divide num_heads=4", "choose one of 1, 2, 4"]),
        ({"data.sequence_length": 1024}, ["rows of 1024 tokens", "model.max_length is 512", "shorten the rows"]),
        ({"num_steps": 0}, ["num_steps", "0", "greater than or equal to 1"]),
        ({"precision": "fp8"}, ["precision", "fp8", "bf16"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("way", ["--set", "--config"])
def test_a_setting_that_is_misspelt_or_impossible(
    call: Call, tmp_path: Path, settings: dict[str, Any], words: list[str], way: str
) -> None:
    if way == "--set":
        result = call("train", "quickstart", *as_options(settings), f"--set=folder={tmp_path / 'run'}")
    else:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(with_settings(call, settings)))
        result = call("train", "--config", tmp_path / "run.yaml", f"--set=folder={tmp_path / 'run'}")
    assert_one_sentence(result, 2, *words)
    assert not (tmp_path / "run").exists()


def with_settings(call: Call, settings: dict[str, Any]) -> dict[str, Any]:
    """The quickstart's settings, with some put in without a check."""
    values: dict[str, Any] = json.loads(call("train", "quickstart", "--show", "--json").out)
    for key, value in settings.items():
        *path, name = key.split(".")
        inner = values
        for each in path:
            inner = inner[each]
        inner[name] = value
    return values


def test_a_setting_below_one_that_holds_none(call: Call) -> None:
    result = call("train", "quickstart", "--set", "num_steps.more=1")
    assert_one_sentence(result, 2, "num_steps.more", "set 'num_steps' itself")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.yaml", "model: {num_layers: 2", "not valid YAML"),
        ("run.json", "{", "not valid JSON"),
        ("run.toml", "a = ", "not valid TOML"),
        ("run.yaml", "- a list", "expected a mapping"),
        ("run.ini", "a = 1", "ends in '.ini'"),
    ],
)
def test_a_config_file_that_cannot_be_read(call: Call, tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    assert_one_sentence(call("train", "--config", tmp_path / name), 2, name, words)
    assert_one_sentence(call("train", "--config", tmp_path / "missing.yaml"), 2, "missing.yaml", "cannot be read")


@pytest.mark.parametrize("place", ["below a file", "where no file can be", "a file"])
@pytest.mark.parametrize("verb", ["train", "quickstart", "quantize"])
def test_an_output_folder_that_cannot_be_written(
    call: Call, tiny: dict[str, Any], model: Path, corpus: Path, tmp_path: Path, verb: str, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    folder = {
        "below a file": tmp_path / "file" / "run",
        "where no file can be": Path("/proc/run"),
        "a file": tmp_path / "file",
    }[place]
    arguments = {
        "train": ["decoder_tiny", f"--set=folder={folder}", *as_options(tiny)],
        "quickstart": ["--folder", folder, *as_options(tiny)],
        "quantize": [model, folder, "--text", corpus],
    }[verb]
    result = call(verb, *arguments, "--json")
    assert_one_sentence(result, 1, str(folder))
    assert result.out == ""
    assert (tmp_path / "file").read_text() == "mine"
    assert files_in(tmp_path) == ["file"]


def test_a_disk_that_is_full_at_a_checkpoint_keeps_the_one_before(
    tiny: dict[str, Any], trained: Finished, tmp_path: Path
) -> None:
    """The disk is full for every file longer than a limit, which the checkpoint is and no other file."""
    command = ["train", "decoder_tiny", f"--set=folder={tmp_path / 'run'}", *as_options(tiny), "--json"]
    with start(*command) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if '"checkpoint_saved", "step": 5' in line)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    kept = newest_valid(tmp_path / "run" / "checkpoints")
    assert kept is not None
    longest = max(path.stat().st_size for path in (tmp_path / "run" / "data").rglob("*") if path.is_file())
    limit_bytes = 150_000
    assert longest < limit_bytes < (kept.path / "state.safetensors").stat().st_size

    full = deepseek(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes,) * 2))
    assert_one_sentence(full, 1, "checkpoints/step-", "cannot be written", "choose another folder")
    assert full.events[-1]["kind"] == "step_done"
    still = newest_valid(tmp_path / "run" / "checkpoints")
    assert still is not None
    assert still.step == kept.step
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old"))]

    assert deepseek(*command).status == 0
    finished = tmp_path / "run" / "model" / "model.safetensors"
    assert finished.read_bytes() == (trained.folder / "model" / "model.safetensors").read_bytes()


def test_a_disk_that_is_full_when_a_stopped_run_saves_itself_is_no_success(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny | {"checkpoint_every": 500, "num_steps": 5000}
    command = ["train", "decoder_tiny", f"--set=folder={tmp_path / 'run'}", *as_options(settings), "--json"]
    with start(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if '"step_done", "step": 6' in line)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    stopping, failed = err.splitlines()
    assert "stopping at the next safe point" in stopping
    assert "cannot be written" in failed
    assert "goes on where it was" not in err


def test_a_file_that_this_user_may_not_read_is_one_sentence(call: Call, model: Path, monkeypatch: Any) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # tests may run as root, whom no file refuses
    assert_one_sentence(call("info", model), 1, "manifest.json: Permission denied", "its permissions")


def test_a_warning_is_one_line_on_standard_error_and_none_on_standard_output(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("few words\n" * 200)
    changes = {"data.sources": [str(tmp_path / "short.txt")], "data.heldout_fraction": 0, "num_steps": 1}
    result = deepseek(
        "train", "decoder_tiny", f"--set=folder={tmp_path / 'run'}", *as_options(tiny | changes), "--json"
    )
    assert result.status == 0
    assert result.events
    assert result.err.startswith("deepseek: warning: the texts yield ")
    assert result.err.count("\n") == 1
