"""The quickstart's end shows every number of its report, and says when it is not of the whole run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli.screen.report import show_summary

REPORT: dict[str, Any] = {
    "train": {
        "first_step": 0,
        "loss_first": 8.35,
        "loss_last": 3.35,
        "heldout_loss": 3.696,
        "tokens_per_s": 15692.4,
        "num_parameters": 6_562_056,
    },
    "baseline": {"unigram_loss": 6.602, "bigram_loss": 5.327, "bigram_discounted_loss": 4.520},
    "int8": {"bytes_ratio": 0.255, "heldout_loss": 3.6963, "decode_speedup": 0.89},
    "serve": {"first_token_ms": 4.2, "tokens_per_s": 460.0},
    "wall_s": 106.0,
}
LOSSES = {1: 8.35, 100: 5.0, 500: 3.35}


def test_every_number_is_shown_and_the_files_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show_summary(REPORT, LOSSES, tmp_path, as_json=False)
    out = capsys.readouterr().out
    shown = "6.6M", "8.35 -> 3.35", "3.696", "6.602", "5.327", "4.520", "15692", "0.255", "0.89", "4 ms", "460"
    for value in (*shown, "1 min 46 s"):
        assert f" {value} │" in out, value
    assert "wall time, from" not in out
    assert [line for line in out.splitlines() if line.startswith(str(tmp_path))] == [
        str(tmp_path / name) for name in ("report.json", "loss.png", "model", "model-int8")
    ]


def test_a_resumed_run_says_from_where_its_wall_time_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = copy.deepcopy(REPORT)
    report["train"]["first_step"] = 300
    show_summary(report, LOSSES, tmp_path, as_json=False)
    assert "wall time, from step 300 on" in capsys.readouterr().out


def test_machines_get_the_image_and_no_characters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show_summary(REPORT, LOSSES, tmp_path, as_json=True)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
