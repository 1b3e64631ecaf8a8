"""The loss of a run as a picture and as characters."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from deepseek.core.extras import require
from deepseek.core.storage import write_file

_BASELINES = {"unigram_loss": "unigram", "bigram_loss": "bigram", "bigram_discounted_loss": "bigram, discounted"}


def draw_loss(losses: dict[int, float], report: dict[str, Any], path: Path) -> None:
    """A PNG of the training loss by step, with the baselines and the held-out loss as lines."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(losses), list(losses.values()), color="tab:blue", linewidth=1, label="training")
    axes.axhline(report["train"]["heldout_loss"], color="tab:blue", linestyle="--", label="held out, at the end")
    for style, (name, label) in zip((":", "-.", (0, (1, 3))), _BASELINES.items(), strict=True):
        axes.axhline(report["baseline"][name], color="tab:gray", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", xlim=(0, max(losses)))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())


def print_loss(losses: dict[int, float], *, width: int) -> None:
    """The training loss by step in a terminal of `width` columns."""
    plot = require("plotext", extra="train")
    plot.clear_figure()
    plot.theme("clear")
    plot.plot(list(losses), list(losses.values()), marker="braille")
    plot.plotsize(min(78, width), 16)
    plot.xlabel("optimizer step")
    plot.ylabel("training loss, nats per token")
    sys.stdout.write(plot.uncolorize(plot.build()) + "\n")
