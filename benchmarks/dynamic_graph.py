"""Changing shapes: compiles an encoder at least 4x sooner than torch.compile, trains on mixed lengths 1.4x faster.

Compiling: the first forward and backward pass of a 12-layer pre-norm encoder with dropout, from wrapping the model to
the end of the step, each in a process and with cache folders of its own, after one eager step that wakes up the
libraries. Sides: `torch.compile`; `dynamic_graph` with an empty cache folder; and again in a new process with the
folder that this filled (torch's own cache folder is empty there, too). Written as models per minute.

Streaming: batches of 16 sentences whose lengths are log-normal (median 24, sigma 0.9, cut to 4..512: mean 36, mean of
the longest in a batch 118), in the order in which they are drawn, padded to the longest of the batch as a collate
function does. Each side trains a tagger (2 layers, 128 wide, SGD) on all of them, in slices that take turns. Padding to
512 is so slow that its side, like eager, runs a tenth of every slice: all its batches have one shape and cost the same.
It starts each slice from the weights that `dynamic_graph` has then, so that losses are compared batch by batch.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Bar, Row, Side, measure, parse_arguments, ratio, report
from deepseek.compiler.dynamic_shapes.dynamic_graph import DynamicExplanation, DynamicGraph, dynamic_graph
from deepseek.core.storage import CACHE_VARIABLE

VOCAB_SIZE, NUM_TAGS, MAX_LENGTH = 1000, 64, 512
BATCH_SIZE, MEDIAN_LENGTH, SIGMA = 16, 24, 0.9
NUM_BATCHES, NUM_SLICES, NUM_LAYERS = 2000, 10, 12
SAMPLED = 10  # padded and eager run one batch in so many
LEARNING_RATE = 0.05
Batch = tuple[Tensor, Tensor, Tensor]


class Block(nn.Module):
    """A pre-norm transformer layer with a mask of keys."""

    def __init__(self, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.num_heads, self.dropout = num_heads, dropout

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3, self.num_heads, D // self.num_heads)
        q_BHTd, k_BHTd, v_BHTd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        a_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=mask_B11T)
        a_BTD = self.out(a_BHTd.transpose(1, 2).reshape(B, T, D))
        x_BTD = x_BTD + F.dropout(a_BTD, self.dropout, self.training)
        y_BTD = self.down(F.gelu(self.up(self.feedforward_norm(x_BTD))))
        return x_BTD + F.dropout(y_BTD, self.dropout, self.training)


class Tagger(nn.Module):
    """An encoder that gives each token a score for each tag."""

    def __init__(self, num_layers: int, size: int = 128, num_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB_SIZE, size), nn.Embedding(MAX_LENGTH, size)
        self.blocks = nn.ModuleList(Block(size, num_heads, dropout) for _ in range(num_layers))
        self.norm, self.tags = nn.LayerNorm(size), nn.Linear(size, NUM_TAGS)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x_BTD = block(x_BTD, mask[:, None, None, :])
        scores: Tensor = self.tags(self.norm(x_BTD))
        return scores


def main() -> None:
    """Measure both, and report them in one table."""
    arguments = parse_arguments(__doc__ or "")
    is_quick = arguments.quick
    compile_rows = measure_compiling(num_rounds=1 if is_quick else 3, num_layers=4 if is_quick else NUM_LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= cache_folders(Path(folder))
        num_slices, slice_size = (1, 20) if is_quick else (NUM_SLICES, NUM_BATCHES // NUM_SLICES)
        stream = Stream(num_slices, slice_size, num_layers=1 if is_quick else 2)
        rows = measure(stream.sides(), num_rounds=stream.num_slices)
    rows = [replace(row, note=stream.note(row.name)) for row in rows]
    whole, once, again = (row.name for row in compile_rows)
    bars = [
        Bar("compiling, cold process: dynamic_graph / torch.compile", ratio(compile_rows, once, whole), 4.0),
        Bar("compiling, warm process: dynamic_graph / torch.compile", ratio(compile_rows, again, whole), 10.0),
        Bar("stream: dynamic_graph / torch.compile padded", ratio(rows, OURS, PADDED), 1.4),
        Bar("stream: dynamic_graph / torch.compile(dynamic=True)", ratio(rows, OURS, SYMBOLIC), 1.4),
        Bar("stream: compilations", float(len(stream.explanation().compilations)), 8, at_least=False),
        Bar("stream: largest difference of a loss to eager", stream.largest_difference(), 1e-3, at_least=False),
    ]
    print(stream.explanation())
    report("dynamic_graph", "models/min (compile), sequences/s (stream)", [*compile_rows, *rows], bars, arguments)


# Compiling


def measure_compiling(num_rounds: int, num_layers: int) -> list[Row]:
    """Models compiled per minute by each side, in turns; every time a new process."""
    seconds: dict[str, list[float]] = {name: [] for name in COMPILING}
    for _ in range(num_rounds):
        with tempfile.TemporaryDirectory() as folder:
            for index, (name, wrap) in enumerate(COMPILING.items()):
                torch_folder = cache_folders(Path(folder), torch_name=str(index))
                seconds[name].append(compile_in_a_process(wrap, num_layers, torch_folder))
    return [
        Row(
            name,
            60 / statistics.median(times_s),
            60 / max(times_s),
            60 / min(times_s),
            f"{num_layers} layers, {statistics.median(times_s):.2f} s",
        )
        for name, times_s in seconds.items()
    ]


COMPILING = {
    "compile: torch.compile, cold": "torch",
    "compile: dynamic_graph, cold": "deepseek",
    "compile: dynamic_graph, warm": "deepseek",
}


def compile_in_a_process(wrap: str, num_layers: int, environment: dict[str, str]) -> float:
    """Return the seconds that the first compiled step takes in a process of its own."""
    code = f"from benchmarks.dynamic_graph import compile_once; compile_once({wrap!r}, {num_layers})"
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the process that compiles with {wrap} failed:\n{result.stderr}")
    return float(json.loads(result.stdout.splitlines()[-1]))


def compile_once(wrap: str, num_layers: int) -> None:
    """Print how long it takes from a model to the end of its first compiled training step."""
    importlib.import_module("torch._inductor.compile_fx")  # importing is not compiling
    torch.manual_seed(0)
    model = Tagger(num_layers, dropout=0.1)
    tokens, mask = torch.randint(1, VOCAB_SIZE, (8, 64)), torch.ones(8, 64, dtype=torch.bool)
    model(tokens, mask).sum().backward()
    began_s = time.perf_counter()
    compiled = torch.compile(model) if wrap == "torch" else dynamic_graph(model, mask="mask")
    compiled(tokens, mask).sum().backward()
    print(json.dumps(time.perf_counter() - began_s))


def cache_folders(folder: Path, *, torch_name: str = "torch") -> dict[str, str]:
    """Cache folders below `folder`, so that nothing from elsewhere is found."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / torch_name), CACHE_VARIABLE: str(folder / "deepseek")}


# Streaming

OURS, SYMBOLIC = "stream: dynamic_graph", "stream: torch.compile(dynamic=True)"
PADDED, EAGER = "stream: torch.compile, padded to 512", "stream: eager"


class Stream:
    """The batches, a model for each side, and the losses that each one saw."""

    def __init__(self, num_slices: int, slice_size: int, num_layers: int) -> None:
        self.num_slices = num_slices
        generator = random.Random(0)
        torch.manual_seed(0)
        self.slices = [[draw_batch(generator) for _ in range(slice_size)] for _ in range(num_slices + 1)]
        self.models = {name: Tagger(num_layers) for name in (OURS, SYMBOLIC, PADDED, EAGER)}
        for model in self.models.values():
            model.load_state_dict(self.models[OURS].state_dict())
        self.weights = {0: copy_of(self.models[OURS])}
        self.losses: dict[str, dict[tuple[int, int], float]] = {name: {} for name in self.models}
        self.first_s: dict[str, float] = {}

    def sides(self) -> list[Side]:
        """Every side trains on the next slice each time it is run."""
        sampled = len(self.slices[0]) // SAMPLED
        models = self.models
        return [
            self._side(OURS, dynamic_graph(models[OURS], mask="mask")),
            self._side(SYMBOLIC, torch.compile(models[SYMBOLIC], dynamic=True)),
            self._side(PADDED, torch.compile(models[PADDED], dynamic=False), sampled, pad=MAX_LENGTH),
            self._side(EAGER, models[EAGER], sampled),
        ]

    def _side(
        self, name: str, run: Callable[[Tensor, Tensor], Tensor], num_batches: int | None = None, pad: int = 0
    ) -> Side:
        model, slice_indices = self.models[name], iter(range(self.num_slices + 1))

        def rate() -> float:
            slice_index = next(slice_indices)
            if num_batches is not None:
                model.load_state_dict(self.weights[slice_index])
            batches = self.slices[slice_index][:num_batches]
            began_s = time.perf_counter()
            for index, batch in enumerate(batches):
                self.losses[name][slice_index, index] = train_step(model, run, pad_batch(batch, pad))
            seconds = time.perf_counter() - began_s
            self.first_s.setdefault(name, seconds)
            if name == OURS:
                self.weights[slice_index + 1] = copy_of(model)
            return len(batches) * BATCH_SIZE / seconds

        return Side(name, rate)

    def largest_difference(self) -> float:
        """Between the losses of `dynamic_graph` and of eager, over all batches that both have seen."""
        ours, eager = self.losses[OURS], self.losses[EAGER]
        return max(abs(ours[key] - eager[key]) for key in eager)

    def explanation(self) -> DynamicExplanation:
        forward = self.models[OURS].forward
        assert isinstance(forward, DynamicGraph)
        return forward.explain()

    def note(self, name: str) -> str:
        losses = list(self.losses[name].values())
        first = f"first slice, with compiling, {self.first_s[name]:.1f} s"
        return f"{len(losses)} batches, last loss {losses[-1]:.4f}; {first}"


def draw_batch(generator: random.Random) -> Batch:
    """Tokens (B, T), mask and tags; a token's tag depends on it and on the one before."""
    lengths = [draw_length(generator) for _ in range(BATCH_SIZE)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, VOCAB_SIZE, mask.shape) * mask
    tags = (tokens + tokens.roll(1, dims=1)) % NUM_TAGS
    return tokens, mask, tags


def draw_length(generator: random.Random) -> int:
    return max(4, min(MAX_LENGTH, round(generator.lognormvariate(math.log(MEDIAN_LENGTH), SIGMA))))


def pad_batch(batch: Batch, length: int) -> Sequence[Tensor]:
    return [F.pad(tensor, (0, max(0, length - tensor.shape[1]))) for tensor in batch]


def train_step(model: nn.Module, run: Callable[[Tensor, Tensor], Tensor], batch: Sequence[Tensor]) -> float:
    """One step of SGD on the mean loss over real tokens; the loss."""
    tokens, mask, tags = batch
    loss = F.cross_entropy(run(tokens, mask)[mask], tags[mask])
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
                parameter.grad = None
    return loss.item()


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    main()
