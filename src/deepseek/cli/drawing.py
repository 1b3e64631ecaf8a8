"""The loss of a run as a picture and as characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek.core.extras import require

_BASELINES = {"unigram_loss": "unigram", "bigram_loss": "bigram", "bigram_discounted_loss": "bigram, discounted"}


def draw_loss(steps: list[int], losses: list[float], report: dict[str, Any], path: Path) -> None:
    """A PNG of the training loss over steps, with the baselines and the held-out loss as lines."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", linewidth=1, label="training")
    axes.axhline(report["train"]["heldout_loss"], color="tab:blue", linestyle="--", label="held out, at the end")
    for style, (name, label) in zip((":", "-.", (0, (1, 3))), _BASELINES.items(), strict=True):
        axes.axhline(report["baseline"][name], color="tab:gray", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", xlim=(0, steps[-1]))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def print_loss(steps: list[int], losses: list[float]) -> None:
    """The training loss over steps in the terminal."""
    plot = require("plotext", extra="train")
    plot.clear_figure()
    plot.theme("clear")
    plot.plot(steps, losses, marker="braille")
    plot.plotsize(78, 16)
    plot.xlabel("optimizer step")
    plot.ylabel("training loss, nats per token")
    plot.show()
