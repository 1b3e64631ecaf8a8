"""Losses as an image and as characters: both show the run that they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from deepseek.cli.screen.plots import plot_curves, plot_loss, print_curves
from deepseek.train.events import RunCurves

REPORT: dict[str, Any] = {
    "train": {"heldout_loss": 3.7},
    "baseline": {"unigram_loss": 6.6, "bigram_loss": 5.3, "bigram_discounted_loss": 4.5},
}


def test_the_image_changes_with_the_losses_and_only_with_them(tmp_path: Path) -> None:
    images = []
    for name, losses in (("one", {1: 8.0, 50: 4.0}), ("same", {1: 8.0, 50: 4.0}), ("other", {1: 8.0, 50: 7.0})):
        plot_loss(losses, REPORT, tmp_path / f"{name}.png")
        images.append(matplotlib.image.imread(tmp_path / f"{name}.png"))
    assert images[0].shape[:2] == (540, 960)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


@pytest.mark.parametrize("width", [40, 200])
def test_the_curve_fits_its_terminal_and_names_its_ends(capsys: pytest.CaptureFixture[str], width: int) -> None:
    print_curves(RunCurves("tokens", {1: 8.25, 50: 4.5, 100: 3.75}, {}, {}), width=width)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(width, 78)
    assert lines[1].startswith("8.25")
    assert "3.75" in "".join(line[:6] for line in lines)
    assert any("100.0" in line for line in lines[-3:])


def test_metrics_are_drawn_below_the_losses_and_beside_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    losses, heldout = {1: 8.25, 50: 4.5, 100: 3.75}, {50: 5.0, 100: 4.0}
    curves = RunCurves("images", losses, heldout, {"accuracy": {50: 0.5, 100: 0.75}})
    print_curves(curves, width=78)
    text = capsys.readouterr().out
    assert "held out" in text and "mean over images" in text and "accuracy" in text and "0.75" in text
    plot_curves(curves, tmp_path / "with.png")
    plot_curves(RunCurves("images", losses, heldout, {}), tmp_path / "without.png")
    sizes = [matplotlib.image.imread(tmp_path / name).shape[:2] for name in ("with.png", "without.png")]
    assert sizes == [(540, 1440), (540, 840)]
