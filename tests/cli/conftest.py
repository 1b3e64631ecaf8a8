"""A little text, the settings of a tiny run on it, and finished runs that the verbs are tried out on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli import build_app, run
from tests.cli.commands import Finished, Result, as_options, deepseek, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> dict[str, Any]:
    """Settings of a run of a second, as `--set` takes them; the model is a small relative of the quickstart's."""
    return {
        "model.vocab_size": 300,
        "model.num_layers": 1,
        "model.hidden_size": 32,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.max_length": 64,
        "data.sources": [str(corpus)],
        "data.heldout_fraction": 0.2,
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "data.batch_size": 4,
        "num_steps": 20,
        "log_every": 2,
        "checkpoint_every": 5,
        "compile": "none",
    }


@pytest.fixture(scope="session")
def tiny_moe(tiny: dict[str, Any]) -> dict[str, Any]:
    """`tiny` for the recipe `quickstart`, whose experts have a size of their own."""
    return tiny | {"model.moe.ffn_size": 32, "optimizer.warmup_steps": 5}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`deepseek` in this process, which saves the import of torch."""

    def call(*arguments: object) -> Result:
        words = [str(each) for each in arguments]
        capsys.readouterr()
        status = run(build_app(asked=words[0]), words)
        out, err = capsys.readouterr()
        return Result(status, out, err)

    return call


@pytest.fixture(scope="session")
def trained(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`deepseek train --json`, never stopped."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return Finished(folder, deepseek("train", "decoder_tiny", f"--set=folder={folder}", *as_options(tiny), "--json"))


@pytest.fixture(scope="session")
def quickstarted(tiny_moe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`deepseek quickstart --json`, never stopped."""
    folder = tmp_path_factory.mktemp("quickstarted") / "run"
    return Finished(folder, deepseek("quickstart", "--folder", folder, *as_options(tiny_moe), "--json"))


@pytest.fixture(scope="session")
def model(trained: Finished) -> Path:
    return trained.folder / "model"
