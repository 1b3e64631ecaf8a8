"""The generations' table of ResNet-50: latency, images per second, memory and accuracy loss of v1.2 to v5.0, measured.

Each generation is what `deepseek.compat` says of it, run by today's engine on this machine (`deepseek benchmark` is the
same comparison for any model). The documents' numbers stand in the notes: they are of their hardware, and what can be
compared is how much faster the newest is than the oldest.

Accuracy needs a model that knows something: a ResNet-50 is trained here on scikit-learn's handwritten digits at 64 x
64, then its last layer is fitted to the same digits at 224 x 224, the size that latency is measured at. A third of the
digits is held out and is what accuracy is measured on; int8 is calibrated on the first of them, without their labels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.measuring import Bar, Row, parse_arguments, report
from deepseek.bench.baselines import Row as Compared_Row
from deepseek.bench.comparison import BenchConfig, Compared, compare
from deepseek.bench.variants import DOCUMENTED, subjects_of_generations
from deepseek.bench.worker import native_precisions
from deepseek.compat.generations import find_generation
from deepseek.core.allocator import keep_freed_memory
from deepseek.mixed_precision.forward_precision import autocast
from deepseek.models import zoo
from deepseek.models.loading import save_model

TRAINED_SIZE, SHOWN_SIZE = 64, 224
NUM_CLASSES = 10
NUM_EPOCHS, BATCH_SIZE, LEARNING_RATE = 6, 64, 2e-3
NUM_HELD_OUT = 600
# Images per second of v1.2 and v5.0 on the documents' hardware: 122 and 833.
GOAL_SPEED, GOAL_LOSS_PERCENT = 6.8, 2.0


def main() -> None:
    """Train, compare, report."""
    arguments = parse_arguments(__doc__ or "")
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_shown = 64 if arguments.quick else NUM_HELD_OUT
        prepare(folder, num_epochs=1 if arguments.quick else NUM_EPOCHS, num_shown=num_shown)
        config = BenchConfig(
            model=str(folder / "resnet50"),
            num_rounds=2 if arguments.quick else 9,
            time_budget_s=30.0 if arguments.quick else 180.0,
            data=str(folder / "digits.npz"),
        )
        events = list(compare(config, subjects_of_generations(DOCUMENTED, native_precisions())))
    table = events[-1]
    assert isinstance(table, Compared)
    rows = {row.name: row for row in table.rows}
    oldest, newest = rows[DOCUMENTED[0]], rows[DOCUMENTED[-1]]
    assert oldest.latency_ms and newest.latency_ms and oldest.accuracy and newest.accuracy
    bars = [
        Bar(f"{newest.name} over {oldest.name}, speed", oldest.latency_ms / newest.latency_ms, GOAL_SPEED),
        Bar(f"accuracy loss of {newest.name}, %", _loss_percent(newest, oldest), GOAL_LOSS_PERCENT, at_least=False),
    ]
    report("generations", "images/s", [_line(row, oldest) for row in table.rows], bars, arguments)


def prepare(folder: Path, *, num_epochs: int, num_shown: int) -> None:
    """A trained ResNet-50 as the artifact `folder/resnet50`, and held-out digits as `folder/digits.npz`."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1).expand(-1, 3, -1, -1) / 8 - 1
    images = nn.functional.interpolate(images, size=TRAINED_SIZE, mode="bilinear")
    labels = torch.from_numpy(digits.target)
    held_out = torch.randperm(len(labels))[:NUM_HELD_OUT]
    is_train = torch.ones(len(labels), dtype=torch.bool)
    is_train[held_out] = False
    model = zoo.build("resnet50", num_classes=NUM_CLASSES, zero_init_residual=True)
    train(model, images[is_train], labels[is_train], num_epochs)
    fit_last_layer(model, enlarge(images[is_train]), labels[is_train])
    save_model(model.eval(), folder / "resnet50")
    shown = held_out[:num_shown]
    np.savez(folder / "digits.npz", inputs=enlarge(images[shown]).numpy(), labels=labels[shown].numpy())


def train(model: nn.Module, images: Tensor, labels: Tensor, num_epochs: int) -> None:
    """AdamW with a one-cycle learning rate, in bf16 where the machine has it."""
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    num_steps = num_epochs * (len(labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
    for step in track(range(num_steps), description="training", console=Console(stderr=True)):
        if step % (len(labels) // BATCH_SIZE) == 0:
            shuffled = torch.randperm(len(labels)).split(BATCH_SIZE)
        batch = shuffled[step % (len(labels) // BATCH_SIZE)]
        with autocast("auto", torch.device("cpu")):
            logits = model(images[batch].contiguous(memory_format=torch.channels_last))
        nn.functional.cross_entropy(logits.float(), labels[batch]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def fit_last_layer(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Ridge regression from what the trunk sees in large images to the labels, in float64."""
    model.eval()
    last, model.fc = model.fc, nn.Identity()
    batches = track(images.split(BATCH_SIZE), description="reading", console=Console(stderr=True))
    features = torch.cat([model(batch.contiguous(memory_format=torch.channels_last)) for batch in batches]).double()
    model.fc = last
    assert isinstance(last, nn.Linear)
    mean = features.mean(0)
    centred = features - mean
    targets = nn.functional.one_hot(labels, NUM_CLASSES).double() * 10
    gram = centred.T @ centred
    gram += 1e-1 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (targets - targets.mean(0)))
    last.weight.copy_(weight.T)
    last.bias.copy_(targets.mean(0) - mean @ weight)


def enlarge(images: Tensor) -> Tensor:
    """Return the images at the size that latency is measured at."""
    return nn.functional.interpolate(images, size=SHOWN_SIZE, mode="bilinear")


def _loss_percent(row: Compared_Row, reference: Compared_Row) -> float:
    assert row.accuracy is not None and reference.accuracy is not None
    return 100 * (reference.accuracy - row.accuracy)


def _line(row: Compared_Row, oldest: Compared_Row) -> Row:
    documented = next(
        (
            measurement
            for measurement in find_generation(row.name).measurements
            if measurement.what.startswith("ResNet-50")
        ),
        None,
    )
    said = "" if documented is None else f"; documents {documented.images_per_s:.0f}/s, {documented.latency_ms} ms"
    if row.latency_ms is None or row.latency_p95_ms is None or row.memory_bytes is None:
        return Row(row.name, None, None, None, row.note)
    note = f"{row.latency_ms:.1f} ms, {row.memory_bytes / 1e9:.2f} GB, loss {_loss_percent(row, oldest):.2f} %{said}"
    return Row(row.name, row.throughput_per_s, 1000 / row.latency_p95_ms, None, f"{note}; {row.note}")


if __name__ == "__main__":
    main()
