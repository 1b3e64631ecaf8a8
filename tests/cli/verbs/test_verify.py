"""`deepseek verify` on two local ranks, started by torch's elastic launcher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.cli.commands import Result, as_options, assert_one_sentence

Call = Callable[..., Result]


def settings(corpus: Path, folder: Path) -> list[str]:
    return as_options(
        {
            "folder": str(folder),
            "data.sources": [str(corpus)],
            "data.vocab_size": 280,
            "data.heldout_fraction": 0.0,
            "model.vocab_size": 281,
            "model.num_layers": 2,
        }
    )


def test_a_run_is_equal_under_plans_in_the_table_and_as_json(call: Call, corpus: Path, tmp_path: Path) -> None:
    chosen = settings(corpus, tmp_path / "run")
    result = call("verify", "decoder_tiny", "--plan=tp=2", "--plan=dp=2,zero_stage=3", "--steps=1", *chosen, "--json")
    assert result.status == 0, result.err
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [verdict["description"] for verdict in found] == ["tp=2", "dp=2 zero_stage=3"]
    assert all(verdict["is_equal"] for verdict in found)
    assert all(
        part["num_compared"] > 40 and part["largest_share"] < 1 for verdict in found for part in verdict["verdicts"]
    )


def test_what_cannot_be_verified_is_one_sentence(call: Call, corpus: Path, tmp_path: Path) -> None:
    chosen = settings(corpus, tmp_path / "run")
    assert_one_sentence(
        call("verify", "decoder_tiny", "--plan", "tp=4", *chosen), 2, "tp=4 does not divide num_heads=6"
    )
    assert_one_sentence(call("verify", "decoder_tiny", "--plan", "teepee=4", *chosen), 2, "unknown setting of a plan")
    assert_one_sentence(call("verify", "--ranks", "2"), 2, "give either a recipe")
