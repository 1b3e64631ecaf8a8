"""Gradient prediction: of the runs that diverge without it, at least three of four learn with it; calm ones within 1 %.

Tiny decoders learn the bytes of Python's library, each setting and seed once without and once with gradient prediction,
on the same batches. A run has diverged when its last loss is no number or above what the frequencies of bytes alone
give, since it then knows nothing of its text. The calm settings are those one would train with.
"""

from __future__ import annotations

import math
import statistics
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.measuring import Bar, parse_arguments, write_json
from deepseek.data.batching import Batch
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.optim.clipping import FixedBound
from deepseek.optim.gradient_prediction import GradientPrediction, GradientPredictionConfig
from deepseek.optim.learning_rates import schedule_factor
from deepseek.optim.optimizers import OptimizerConfig, build_optimizer, set_learning_rate
from deepseek.train.config import TrainConfig
from deepseek.train.steps import take_step
from deepseek.train.tasks.causal_lm import CausalLM

CONFIG = DecoderConfig(
    vocab_size=256, num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=4, ffn_size=128, max_length=32
)
BATCH_SIZE, LENGTH, NUM_STEPS, NUM_LAST = 16, 32, 120, 20


@dataclass(frozen=True)
class Setting:
    """One way of training."""

    name: str
    optimizer: str
    learning_rate: float
    warmup_steps: int = 0
    grad_clip: float | None = 1.0
    precision: str = "fp32"
    is_calm: bool = False


SETTINGS = (
    Setting("SGD 1, no clipping", "sgd", 1.0, grad_clip=None),
    Setting("SGD 3, no clipping", "sgd", 3.0, grad_clip=None),
    Setting("SGD 1, no clipping, bf16", "sgd", 1.0, grad_clip=None, precision="bf16"),
    Setting("SGD 1, clipped", "sgd", 1.0),
    Setting("SGD 10, clipped", "sgd", 10.0),
    Setting("AdamW 0.3, warm-up 5", "adamw", 0.3, warmup_steps=5),
    Setting("AdamW 1, warm-up 40", "adamw", 1.0, warmup_steps=40),
    Setting("Muon 0.5, warm-up 20", "muon", 0.5, warmup_steps=20),
    Setting("AdamW 0.001", "adamw", 1e-3, is_calm=True),
    Setting("AdamW 0.003, warm-up 20", "adamw", 3e-3, warmup_steps=20, is_calm=True),
    Setting("AdamW 0.003, warm-up 20, bf16", "adamw", 3e-3, warmup_steps=20, precision="bf16", is_calm=True),
    Setting("AdamW 0.01, warm-up 5", "adamw", 1e-2, warmup_steps=5, is_calm=True),
    Setting("Muon 0.003, warm-up 20", "muon", 3e-3, warmup_steps=20, is_calm=True),
    Setting("SGD 0.03", "sgd", 0.03, is_calm=True),
)


@dataclass(frozen=True)
class Outcome:
    """One setting and seed, without and with gradient prediction."""

    name: str
    seed: int
    is_calm: bool
    without: float
    with_prediction: float
    num_damped: int
    """Steps at which something was foreseen."""


def main() -> None:
    """Train all runs and report."""
    arguments = parse_arguments(__doc__ or "")
    num_seeds, num_steps = (1, 40) if arguments.quick else (2, NUM_STEPS)
    torch.set_num_threads(1)
    text = read_text()
    known = entropy_of_bytes(text)
    runs = [(setting, seed) for setting in SETTINGS for seed in range(num_seeds)]
    outcomes = [compare(*run, text, num_steps) for run in track(runs, console=Console(stderr=True))]
    diverged = [outcome for outcome in outcomes if not outcome.is_calm and not outcome.without <= known]
    calm = [outcome for outcome in outcomes if outcome.is_calm]
    bars = [
        Bar("runs that diverge without", len(diverged), 6 if arguments.quick else 12),
        Bar(
            "share of them that learns with it",
            statistics.fmean(outcome.with_prediction <= known for outcome in diverged) if diverged else None,
            0.75,
        ),
        Bar(
            "calm runs: worst loss with / without",
            max(outcome.with_prediction / outcome.without for outcome in calm),
            1.01,
            at_least=False,
        ),
    ]
    title = f"loss after {num_steps} steps; frequencies of bytes alone: {known:.2f}"
    Console().print(show(outcomes, title), *(show_bar(bar) for bar in bars), sep="\n")
    if arguments.json:
        rows = [{key: as_json(value) for key, value in asdict(outcome).items()} for outcome in outcomes]
        write_json(arguments.json, "gradient_prediction", "nats/byte", rows, bars)
    if arguments.markdown:
        arguments.markdown.write_text(as_markdown(outcomes, title, bars), encoding="utf-8")


def compare(setting: Setting, seed: int, text: Tensor, num_steps: int) -> Outcome:
    """Train twice on the same batches."""
    without, _ = train(setting, seed, text, num_steps, None)
    prediction = GradientPrediction(GradientPredictionConfig())
    with_prediction, num_damped = train(setting, seed, text, num_steps, prediction)
    return Outcome(setting.name, seed, setting.is_calm, without, with_prediction, num_damped)


def train(
    setting: Setting, seed: int, text: Tensor, num_steps: int, prediction: GradientPrediction | None
) -> tuple[float, int]:
    """Return the mean of the last losses, infinite where one is no number, and the number of damped steps."""
    torch.manual_seed(seed)
    model = Decoder(CONFIG).train()
    momentum = 0.9 if setting.optimizer == "sgd" else 0.0
    optimizer = build_optimizer(
        model, OptimizerConfig(name=setting.optimizer, momentum=momentum), setting.learning_rate
    )
    task, bound, batches = CausalLM(TrainConfig()), FixedBound(setting.grad_clip), draw(text, seed)
    losses, num_damped = [], 0
    for step in range(num_steps):
        factor = schedule_factor(
            "constant",
            step,
            num_steps=num_steps,
            warmup_steps=setting.warmup_steps,
            final_factor=1.0,
            decay_share=1.0,
        )
        set_learning_rate(optimizer, setting.learning_rate * factor)
        result = take_step(
            task,
            model,
            optimizer,
            [next(batches)],
            precision=setting.precision,
            bound=bound,
            prediction=prediction,
        )
        if not result.is_taken:
            return math.inf, num_damped
        losses.append(result.loss)
        num_damped += bool(result.damping.reason)
    return statistics.fmean(losses[-NUM_LAST:]), num_damped


def draw(text: Tensor, seed: int) -> Iterator[Batch]:
    """Batches of random places in the text, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        begins = torch.randint(0, len(text) - LENGTH - 1, (BATCH_SIZE,), generator=generator)
        rows_BT = torch.stack([text[begin : begin + LENGTH + 1] for begin in begins.tolist()])
        yield Batch(rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous(), BATCH_SIZE * LENGTH)


def read_text() -> Tensor:
    """Return the bytes of the modules at the top of Python's library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def entropy_of_bytes(text: Tensor) -> float:
    """Return the loss in nats of a model that knows how frequent each byte is."""
    shares = torch.bincount(text, minlength=256).double() / len(text)
    return float(torch.special.entr(shares).sum())


def as_json(value: object) -> object:
    """JSON knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def list_cells(outcome: Outcome) -> list[str]:
    """Write an outcome for a table."""
    losses = (outcome.without, outcome.with_prediction)
    written = [f"{loss:.3f}" if loss < 100 else f"{loss:.1e}" if math.isfinite(loss) else "inf" for loss in losses]
    kind = "calm" if outcome.is_calm else "too fast"
    return [outcome.name, kind, str(outcome.seed), *written, str(outcome.num_damped)]


COLUMNS = ("setting", "kind", "seed", "without", "with", "damped steps")


def show(outcomes: list[Outcome], title: str) -> Table:
    """Build the table for the screen."""
    table = Table(*COLUMNS, title=title, title_justify="left")
    for outcome in outcomes:
        table.add_row(*list_cells(outcome))
    return table


def show_bar(bar: Bar) -> str:
    """Write a bar as a line."""
    value = "not measured" if bar.value is None else f"{bar.value:.4g}"
    return f"{bar.name}: {value} (goal: {'at least' if bar.at_least else 'at most'} {bar.goal:g})"


def as_markdown(outcomes: list[Outcome], title: str, bars: list[Bar]) -> str:
    """Write the table and the bars as Markdown."""
    lines = [title, "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(list_cells(outcome))} |" for outcome in outcomes]
    return "\n".join([*lines, "", *(f"- {show_bar(bar)}" for bar in bars), ""])


if __name__ == "__main__":
    main()
