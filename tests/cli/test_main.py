"""The command as a whole: what help teaches, exit statuses, the ways to start it, completion in the shell."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import deepseek as ds
from deepseek.cli import VERBS
from tests.cli.commands import Result, assert_one_sentence, deepseek, environment

Call = Callable[..., Result]
BIN = Path(sys.executable).parent


def test_the_list_of_verbs_is_the_list_of_files(call: Call) -> None:
    files = {path.stem.replace("_", "-") for path in Path(ds.__file__).parent.joinpath("cli", "verbs").glob("*.py")}
    assert set(VERBS) <= files
    result = call("--help")
    assert result.status == 0
    listed = re.findall(r"^│ ([a-z][a-z-]*) ", result.out, flags=re.MULTILINE)
    assert set(listed) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_parameter_and_gives_an_example(call: Call, verb: str) -> None:
    result = call(verb, "--help")
    assert result.status == 0
    text = " ".join(result.out.replace("│", " ").split())
    assert f"Example: deepseek {verb}" in text
    name = verb.replace("-", "_")
    function = getattr(importlib.import_module(f"deepseek.cli.verbs.{name}"), name)
    parameters = inspect.signature(function).parameters
    assert "json" in parameters
    for parameter in parameters:
        meaning = re.search(rf"^{parameter}\n    (.+)", inspect.getdoc(function) or "", flags=re.MULTILINE)
        assert meaning is not None, parameter
        assert " ".join(meaning[1].replace("`", "").split()[:3]) in text


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_is_understood(call: Call, verb: str) -> None:
    """Every option that an example names is there."""
    text = " ".join(call(verb, "--help").out.replace("│", " ").split())
    example = text.partition("Example: ")[2].partition("╭")[0]
    for option in re.findall(r"--[a-z-]+", example):
        assert text.count(option) > example.count(option)


def test_without_a_verb_the_help_is_shown(call: Call) -> None:
    result = call("--help")
    assert deepseek() == Result(0, result.out, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["nonsense", "quickstart", "train"]),
        (["trian"], ["trian", "train"]),
        (["info"], ["--path"]),
        (["quantize", "here"], ["--out"]),
        (["generate", "here", "def ", "--max-tokens", "many"], ["--max-tokens", "many"]),
        (["generate", "here", "def ", "--max-token", "3"], ["--max-token", "--max-tokens"]),
        (["serve", "here", "--quantize", "int4"], ["int4", "int8"]),
        (["serve", "here", "--port", "70000"], ["port", "70000"]),
        (["quantize", "a", "b", "--max-tokens", "0"], ["--max-tokens", "0"]),
        (["train"], ["recipe", "--config"]),
        (["train", "quickstart", "--config", "file.yaml"], ["recipe", "--config"]),
        (["train", "quickstrat"], ["'quickstrat'", "did you mean 'quickstart'"]),
        (["train", "quickstart", "more"], ["more"]),
        (["quickstart", "--set", "num_steps"], ["num_steps", "KEY=VALUE"]),
        (["quickstart", "--set", "num_steps=many"], ["num_steps", "many"]),
        (["quickstart", "--set", "data.heldout_fraction=0"], ["heldout_fraction"]),
        (["quickstart", "--set", "device=abacus"], ["device", "abacus"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value, list) else "",
)
def test_wrong_usage_is_one_sentence_and_status_2(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert_one_sentence(result, 2, *words)
    assert result.out == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []


@pytest.mark.parametrize("command", [["-m", "deepseek"], ["deepseek"], ["deepseek-serve"]], ids=" ".join)
def test_the_ways_to_start_it_are_one(call: Call, command: list[str], tmp_path: Path) -> None:
    program = [sys.executable, *command] if command[0] == "-m" else [str(BIN / command[0])]
    verb = [] if command == ["deepseek-serve"] else ["serve"]
    done = subprocess.run([*program, *verb, str(tmp_path)], capture_output=True, text=True, env=environment())
    result = Result(done.returncode, done.stdout, done.stderr)
    assert result == call("serve", tmp_path)
    assert_one_sentence(result, 1, "holds no model")


def test_the_version_is_the_packages(call: Call) -> None:
    assert call("--version").out.strip() == ds.__version__


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_installed_and_knows_the_verbs_and_their_options(tmp_path: Path, shell: str) -> None:
    environment_there = environment() | {"HOME": str(tmp_path), "SHELL": f"/bin/{shell}"}
    result = deepseek("--install-completion", "--shell", shell, env=environment_there)
    assert result.status == 0, result.err
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    script = max(written, key=len)
    for word in (*VERBS, "max-loss-increase", "shutdown-timeout-s"):
        assert word in script


def test_completion_in_bash_offers_the_verbs(tmp_path: Path) -> None:
    environment_there = environment() | {"HOME": str(tmp_path), "SHELL": "/bin/bash"}
    assert deepseek("--install-completion", "--shell", "bash", env=environment_there).status == 0
    script = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    program = f"""
        source {script}
        COMP_WORDS=(deepseek qu) COMP_CWORD=1 COMP_LINE='deepseek qu' COMP_POINT=11
        $(complete -p deepseek | sed 's/.*-F \\([^ ]*\\) .*/\\1/') deepseek qu deepseek
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, env=environment_there)
    assert sorted(done.stdout.split()) == ["quantize", "quickstart"]


def test_a_closed_pipe_ends_a_listing_without_a_traceback() -> None:
    """As in `deepseek ... | head -1`, when head is gone before the first byte."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "deepseek", "train", "quickstart", "--show"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_help_and_version_are_words_too(call: Call) -> None:
    assert deepseek("help") == deepseek("--help")
    assert deepseek("help", "info") == deepseek("info", "--help")
    assert deepseek("version") == deepseek("--version")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "decoder_tiny", "more"], ["'more'", "--name value", "--help"]),
        (["train", "decoder_tiny", "--set", "data.sources=my", "notes"], ["'notes'", "text with spaces is quoted"]),
        (["train", "decoder_tiny", "--set", "data.sources=[a, b"], ["data.sources", "--set 'data.sources=[a, b]'"]),
        (["train", "decoder_tiny", "--set", "num_layers=2"], ["'num_layers'", "did you mean 'model.num_layers'"]),
        (["train", "decoder_tiny", "--set", "steps=2"], ["'steps'", "did you mean 'num_steps'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_answered_with_what_was_probably_meant(call: Call, arguments: list[str], words: list[str]) -> None:
    assert_one_sentence(call(*arguments), 2, *words)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_says_how_a_command_waits_and_what_changes_that(call: Call, arguments: list[str]) -> None:
    text = " ".join(call(*arguments).out.split())
    assert "GOMP_SPINCOUNT" in text
    assert "OMP_WAIT_POLICY" in text
