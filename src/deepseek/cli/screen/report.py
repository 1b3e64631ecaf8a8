"""The end of the quickstart: the table of what came out, and the loss by step as an image and in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from deepseek.cli.screen.plots import plot_loss, print_curves
from deepseek.cli.screen.tables import show_table
from deepseek.core.units import format_count, format_seconds
from deepseek.train.events import RunCurves


def show_summary(report: dict[str, Any], losses: dict[int, float], folder: Path, *, as_json: bool) -> None:
    """Write FOLDER/loss.png and, unless `as_json`, print the loss by step, the table, and where the files are."""
    plot_loss(losses, report, folder / "loss.png")
    if as_json:
        return
    print_curves(RunCurves("tokens", losses, {}, {}), width=Console().width)
    first_step = report["train"]["first_step"]
    wall_time = f"wall time, from step {first_step} on" if first_step else "wall time"
    train, baseline, int8, serve = report["train"], report["baseline"], report["int8"], report["serve"]
    show_table(
        "What came out",
        ("", "value"),
        [
            ("parameters", format_count(train["num_parameters"])),
            ("training loss, first -> last", f"{train['loss_first']:.2f} -> {train['loss_last']:.2f}"),
            ("held-out loss, nats per token", f"{train['heldout_loss']:.3f}"),
            ("  unigram", f"{baseline['unigram_loss']:.3f}"),
            ("  bigram, add-one", f"{baseline['bigram_loss']:.3f}"),
            ("  bigram, discounted", f"{baseline['bigram_discounted_loss']:.3f}"),
            ("training, tokens/s", f"{train['tokens_per_s']:.0f}"),
            ("int8 bytes / FP32 bytes", f"{int8['bytes_ratio']:.3f}"),
            ("int8 held-out loss", f"{int8['heldout_loss']:.3f}"),
            ("int8 decoding speed / FP32", f"{int8['decode_speedup']:.2f}"),
            ("server, first token", f"{serve['first_token_ms']:.0f} ms"),
            ("server, tokens/s", f"{serve['tokens_per_s']:.0f}"),
            (wall_time, format_seconds(report["wall_s"])),
        ],
    )
    for name in ("report.json", "loss.png", "model", "model-int8"):
        sys.stdout.write(f"{folder / name}\n")
