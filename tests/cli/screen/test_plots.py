"""Losses as an image and as characters: both show the run that they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from deepseek.cli.screen.plots import plot_loss, print_loss

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
    print_loss({1: 8.25, 50: 4.5, 100: 3.75}, width=width)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(width, 78)
    assert lines[1].startswith("8.25")
    assert "3.75" in "".join(line[:6] for line in lines)
    assert any("100.0" in line for line in lines[-3:])
