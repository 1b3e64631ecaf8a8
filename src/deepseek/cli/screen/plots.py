"""The curves of a run as an image and as characters, and the timeline of a pipeline as an image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.core.extras import require
from deepseek.core.storage import write_file

if TYPE_CHECKING:
    from deepseek.planning.estimate.simulation import Timeline
    from deepseek.planning.scaling import ScalingCurve
    from deepseek.train.events import RunCurves

# The passes of a pipeline's timeline.
COLORS = {"forward": "#4c78a8", "backward": "#f58518", "weight": "#54a24b"}
_BASELINES = {"unigram_loss": "unigram", "bigram_loss": "bigram", "bigram_discounted_loss": "bigram, discounted"}


def plot_loss(losses: dict[int, float], report: dict[str, Any], path: Path) -> None:
    """Write a PNG of the training loss by step, with the baselines and the held-out loss as lines."""
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
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_file(path, image.getvalue())


def print_curves(curves: RunCurves, *, width: int) -> None:
    """Print the losses by step in a terminal of `width` columns, and the metrics where there is more than one value."""
    loss = {"training": curves.losses, "held out": curves.heldout_losses}
    _print_lines(loss, f"loss, mean over {curves.unit}", width=width)
    metrics = {name: values for name, values in curves.metrics.items() if len(values) > 1}
    if metrics:
        _print_lines(metrics, "held out", width=width)


def _print_lines(lines: dict[str, dict[int, float]], label: str, *, width: int) -> None:
    plot = require("plotext", extra="train")
    plot.clear_figure()
    plot.theme("clear")
    shown = {name: values for name, values in lines.items() if len(values) > 1}
    # Each line has a marker of its own, since there are no colors; one alone needs no legend.
    for (name, values), marker in zip(shown.items(), ("braille", "*", "o", "+", "x") * len(shown), strict=False):
        plot.plot(list(values), list(values.values()), marker=marker, label=name if len(shown) > 1 else None)
    plot.plotsize(min(78, width), 16)
    plot.xlabel("optimizer step")
    plot.ylabel(label if len(shown) > 1 else f"{next(iter(shown))} {label}")
    sys.stdout.write(plot.uncolorize(plot.build()) + "\n")


def plot_curves(curves: RunCurves, path: Path) -> None:
    """Write a PNG of the losses by step and, beside them, of the metrics that were measured."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12 if curves.metrics else 7, 4.5), layout="constrained")
    axes, *beside = figure.subplots(1, 2 if curves.metrics else 1, squeeze=False)[0]
    axes.plot(list(curves.losses), list(curves.losses.values()), linewidth=1, label="training")
    axes.plot(list(curves.heldout_losses), list(curves.heldout_losses.values()), marker="o", label="held out")
    axes.set(xlabel="optimizer step", ylabel=f"loss, mean over {curves.unit}")
    for other in beside:
        for name, values in curves.metrics.items():
            other.plot(list(values), list(values.values()), marker="o", label=name)
        other.set(xlabel="optimizer step", ylabel="held out")
    for panel in (axes, *beside):
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_file(path, image.getvalue())


def plot_scaling(curves: Sequence[ScalingCurve], path: Path) -> None:
    """Write a PNG of the efficiency by devices, a line for each model."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        devices = [float(row[curve.header.index("devices")]) for row in curve.rows]
        efficiency = [100 * float(row[curve.header.index("efficiency")]) for row in curve.rows]
        axes.plot(devices, efficiency, marker="o", label=curve.claim)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="devices", ylabel="efficiency, %", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_file(path, image.getvalue())


def plot_timeline(timeline: Timeline, title: str, path: Path) -> None:
    """Write a PNG with one row per stage of a pipeline and one box per pass, from left to right as time goes."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 1.6 + 0.32 * timeline.num_stages), layout="constrained")
    axes = figure.subplots()
    for event in timeline.events:
        span = (1e3 * event.start_s, 1e3 * (event.end_s - event.start_s))
        shade = 1.0 - 0.5 * (event.work.chunk % 4) / 4
        color = COLORS[event.work.kind]
        axes.broken_barh(
            [span], (event.stage - 0.42, 0.84), facecolor=color, alpha=shade, edgecolor="white", linewidth=0.4
        )
        if span[1] > 12 * timeline.step_time_s:  # a box of more than 1.2 % of the width has room for its number
            middle = span[0] + span[1] / 2
            axes.text(
                middle, event.stage, str(event.work.micro_batch), ha="center", va="center", fontsize=7, color="white"
            )
    axes.set(xlabel="ms", ylabel="stage", xlim=(0, 1e3 * timeline.step_time_s), ylim=(timeline.num_stages - 0.5, -0.5))
    axes.set_yticks(range(timeline.num_stages))
    axes.set_title(f"{title}; {timeline.bubble_fraction:.1%} waiting", fontsize=10)
    kinds = [kind for kind in COLORS if any(event.work.kind == kind for event in timeline.events)]
    handles = [Patch(color=COLORS[kind], label=kind) for kind in kinds]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_file(path, image.getvalue())
