"""`deepseek train`: from settings to an artifact, and on from where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek.checkpoint.restoring import newest_valid
from deepseek.models.loading import load_model
from deepseek.recipes import RECIPES, load_recipe
from deepseek.train.config import TrainConfig
from tests.cli.commands import Finished, Result, as_options, assert_one_sentence

Call = Callable[..., Result]


def test_json_lines_tell_the_whole_run(trained: Finished) -> None:
    assert (trained.result.status, trained.result.err) == (0, "")
    events = trained.result.events
    assert trained.result.kinds[0] == "tokenizer_ready"
    assert [event["step"] for event in events if event["kind"] == "step_done"] == [1, *range(2, 21, 2)]
    assert [event["step"] for event in events if event["kind"] == "checkpoint_saved"] == [5, 10, 15, 20]
    assert events[-1]["kind"] == "model_saved"
    assert events[-1]["path"] == str(trained.folder / "model")
    assert load_model(events[-1]["path"]).config.hidden_size == 32


def test_events_file_holds_what_was_shown(trained: Finished) -> None:
    lines = (trained.folder / "events.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert all(event.pop("time_s") > 1.7e9 for event in written)
    assert written == trained.result.events


def test_a_folder_holds_the_run_and_nothing_else(trained: Finished) -> None:
    assert {path.name for path in trained.folder.iterdir()} == {
        "data",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "events.jsonl",
        "model",
    }
    assert not [path for path in trained.folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_shown_settings_are_read_back_as_a_config_file(call: Call, tmp_path: Path, recipe: str) -> None:
    shown = call("train", recipe, "--set", "num_steps=7", "--show")
    as_json = call("train", recipe, "--set", "num_steps=7", "--show", "--json")
    (tmp_path / "run.yaml").write_text(shown.out)
    (tmp_path / "run.json").write_text(as_json.out)
    expected = load_recipe(recipe).override({"num_steps": 7})
    assert TrainConfig.from_file(tmp_path / "run.yaml") == expected
    assert TrainConfig.from_file(tmp_path / "run.json") == expected
    assert (shown.err, as_json.err) == ("", "")


def test_a_config_file_with_overrides_trains(call: Call, tiny: dict[str, Any], tmp_path: Path) -> None:
    config = load_recipe("decoder_tiny").override(tiny | {"folder": str(tmp_path / "run")})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    result = call("train", "--config", tmp_path / "run.yaml", "--set", "num_steps=2", "--json")
    assert result.status == 0
    assert [event["step"] for event in result.events if event["kind"] == "step_done"] == [1, 2]


@pytest.fixture
def copy(trained: Finished, tmp_path: Path) -> Path:
    """The folder of a finished run, to do what one likes with."""
    return shutil.copytree(trained.folder, tmp_path / "copy")


def test_a_finished_run_is_written_again_without_a_step(call: Call, tiny: dict[str, Any], copy: Path) -> None:
    before = (copy / "model" / "model.safetensors").read_bytes()
    result = call("train", "decoder_tiny", "--set", f"folder={copy}", *as_options(tiny))
    assert result.status == 0
    assert "steps 20 to 20" in result.out
    assert (copy / "model" / "model.safetensors").read_bytes() == before


def test_another_learning_rate_in_the_same_folder_says_what_changed_and_what_to_do(
    call: Call, tiny: dict[str, Any], copy: Path
) -> None:
    before = newest_valid(copy / "checkpoints")
    changes = tiny | {"optimizer.weight_decay": 0.5}
    result = call("train", "decoder_tiny", "--set", f"folder={copy}", *as_options(changes), "--json")
    assert_one_sentence(result, 1, "optimizer.weight_decay was ", "choose another folder")
    after = newest_valid(copy / "checkpoints")
    assert before is not None
    assert after is not None
    assert (before.step, before.path) == (after.step, after.path)


def test_the_folder_of_a_run_goes_on_with_more_steps_wherever_it_lies(call: Call, copy: Path) -> None:
    result = call("train", str(copy), "--set", "num_steps=22", "--json")
    assert result.status == 0
    steps = [json.loads(line)["step"] for line in result.out.splitlines() if '"step_done"' in line]
    assert steps[-1] == 22 and min(steps) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{tmp}",), "deepseek train decoder_tiny --set 'data.sources=["),
        (("{tmp}/run.yaml",), "write --config "),
        (("decoder_tiny", "--folder", "x"), "--folder is a setting of the run; write --set folder=VALUE"),
        (
            ("decoder_tiny", "--steps", "5"),
            "settings are given as --set KEY=VALUE: unknown setting 'steps'; did you mean",
        ),
        (("decoder_tiny", "--accum-steps=5"), "write --set accum_steps=VALUE"),
        (("--task", "casual_lm"), "causal_lm"),
        (
            ("--task", "no_such_module:Task"),
            "named 'no_such_module'); write MODULE:CLASS",
        ),
        (("--task", "json:JSONDecoder"), "is no class of deepseek.train.Task"),
        (("decoder_tiny", "--task", "causal_lm"), "give either a recipe"),
        ((), "give either a recipe"),
    ],
)
def test_what_is_no_recipe_names_the_way_out(
    call: Call, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "run.yaml").write_text("num_steps: 3")
    result = call("train", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.status != 0
    assert message in result.err and result.err.count("\n") == 1


def test_a_task_of_ones_own_is_trained_from_the_command_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    options = ("--set", f"folder={tmp_path}", "--set", "num_steps=3", "--set", "data.batch_size=4")
    result = call("train", "--task", "tests.train.own_task:Line", *options, "--json")
    assert result.status == 0, result.err
    assert (tmp_path / "model" / "manifest.json").exists()


def test_settings_that_decide_nothing_may_change(call: Call, tiny: dict[str, Any], copy: Path) -> None:
    changes = tiny | {"log_every": 7, "checkpoint_every": 9, "evaluation_units": 100}
    result = call("train", "decoder_tiny", "--set", f"folder={copy}", *as_options(changes), "--json")
    assert result.status == 0


def test_a_run_without_held_out_text_trains_and_says_no_loss_of_it(
    call: Call, tiny: dict[str, Any], tmp_path: Path
) -> None:
    changes = tiny | {"data.heldout_fraction": 0, "num_steps": 2, "folder": str(tmp_path / "run")}
    result = call("train", "decoder_tiny", *as_options(changes), "--json")
    assert result.status == 0
    assert "evaluated" not in result.kinds


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "lines"])
def test_text_that_is_not_utf8_is_counted_and_shown(
    call: Call, tiny: dict[str, Any], corpus: Path, tmp_path: Path, as_json: bool
) -> None:
    text = shutil.copytree(corpus, tmp_path / "text")
    (text / "latin1.txt").write_bytes("café crème brûlé".encode("latin-1"))
    (text / "broken.txt").write_bytes(b"half \xe6\xbc and stray \xff")
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("a short text\n" * 50)
    changes = {"data.sources": [str(text)], "data.heldout_sources": [str(held_out)], "num_steps": 1}
    options = as_options(tiny | changes | {"folder": str(tmp_path / "run")})
    result = call("train", "decoder_tiny", *options, *(["--json"] if as_json else []))
    assert result.status == 0
    if as_json:
        counts = [(event["num_undecodable"], event["num_undecodable_documents"]) for event in cache_events(result)]
        assert counts == [(0, 0), (6, 2)]
    else:
        assert result.out.count("not UTF-8") == 1
        assert "6 places in 2 of them are not UTF-8 and became U+FFFD" in result.out


def cache_events(result: Result) -> list[dict[str, Any]]:
    return [event for event in result.events if event["kind"] == "cache_ready"]


def test_the_loss_of_the_whole_run_is_drawn_at_the_end(call: Call, tiny: dict[str, Any], copy: Path) -> None:
    """Its steps were done by another process."""
    result = call("train", "decoder_tiny", f"--set=folder={copy}", *as_options(tiny))
    assert (result.status, result.err) == (0, "")
    curve = result.out.splitlines()[-17:]
    losses = [
        event["loss"] for event in map(json.loads, (copy / "events.jsonl").read_text().splitlines()) if "loss" in event
    ]
    assert any(line.lstrip().startswith(f"{max(losses):.2f}") for line in curve)
    assert any("optimizer step" in line for line in curve[-3:])
    assert "step_done" not in result.out
    assert (
        "optimizer step" not in call("train", "decoder_tiny", f"--set=folder={copy}", *as_options(tiny), "--json").out
    )
