"""Training a dense 12 M decoder: tokens/s against plain loops of PyTorch and the transformers Trainer.

At least 2x a plain eager FP32 loop, 1.1x the plain loop compiled, and 1.2x the Trainer.

Every side trains the same Llama shape on the same random tokens with AdamW and clipping: this framework's step (eager
and with compiled blocks), a plain PyTorch loop in FP32 and the usual way to speed it up (compile and autocast), and the
`transformers` Trainer in FP32, in bf16, and in bf16 compiled, of which the best counts. Each is a process of its own,
ours set up as that of `deepseek train`. What is timed are steps in the middle of training; compiling and setting up are
not.

Ours and the compiled plain loop compute in what is faster here, bf16 or FP32, as `precision=auto` chooses. On a CPU
without instructions for bf16 that is FP32: a plain loop in bf16 takes minutes a step there and would be no peer, and
the Trainer's bf16 sides are left out. In FP32 three quarters of a step are matmuls, at the same speed on all sides.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import Bar, Row, Side, measure, parse_arguments, ratio, report
from benchmarks.training.turns import Round, Turns, serve, set_up_as_the_command_does, started

if TYPE_CHECKING:
    from torch import Tensor, nn

SHAPE = {
    "vocab_size": 4096,
    "num_layers": 6,
    "hidden_size": 384,
    "num_heads": 6,
    "num_kv_heads": 6,
    "ffn_size": 1024,
    "max_length": 256,
}
BATCH_SIZE, LENGTH, LEARNING_RATE, GRAD_CLIP = 8, 256, 1e-3, 1.0
MORE_STEPS = 100_000  # than any side takes here


def main() -> None:
    """Measure all sides and report."""
    arguments = parse_arguments(__doc__ or "")
    num_steps, num_rounds = (3, 1) if arguments.quick else (8, 5)
    with ExitStack() as stack:
        rows = measure(list(start_sides(num_steps, stack)), num_rounds=num_rounds)
    best = best_of(rows, "deepseek")
    bars = [
        Bar("ours / plain eager FP32", ratio(rows, best, "plain loop fp32"), 2.0),
        Bar("ours / plain compiled", ratio(rows, best, "plain loop compiled"), 1.1),
        Bar("ours / best of the Trainer", ratio(rows, best, best_of(rows, "Trainer")), 1.2),
    ]
    report("train_lm", "tokens/s", rows, bars, arguments)


def start_sides(num_steps: int, stack: ExitStack) -> Iterator[Side]:
    """Start the process of each side, whose model goes on learning from round to round."""
    import torch

    from deepseek.mixed_precision.forward_precision import choose_precision

    is_bf16_fast = choose_precision("auto", torch.device("cpu")) == "bf16"
    for name in SIDES:
        if name.startswith("Trainer bf16") and not is_bf16_fast:
            yield Side(name, None, "bf16 is slower than FP32 here")
            continue
        chosen = name.startswith("deepseek") or name == "plain loop compiled"
        note = ("in bf16" if is_bf16_fast else "in FP32, which is faster here") if chosen else ""
        running = stack.enter_context(started("benchmarks.train_lm", {"side": name, "num_steps": num_steps}))
        yield Side(name, running.rate, note)


def best_of(rows: list[Row], prefix: str) -> str:
    """Return the name of the fastest side whose name begins so."""
    return max((row for row in rows if row.name.startswith(prefix)), key=lambda row: row.median or 0).name


# ---- the sides, each in its process


def random_tokens(seed: int) -> Iterator[Tensor]:
    """(B, T + 1) tokens without end."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, SHAPE["vocab_size"], (BATCH_SIZE, LENGTH + 1), generator=generator)


def build_model() -> nn.Module:
    """Return the decoder with the weights that our sides and the plain loops begin with."""
    import torch

    from deepseek.models.decoder.model import Decoder, DecoderConfig

    torch.manual_seed(0)
    return Decoder(DecoderConfig(**SHAPE)).train()


def train_ours(num_steps: int, *, is_compiled: bool) -> Iterator[Round]:
    """Train by this framework's step, in a process set up as the command line does."""
    set_up_as_the_command_does()
    import torch

    from deepseek.data.batching import Batch
    from deepseek.mixed_precision.forward_precision import choose_precision
    from deepseek.optim.clipping import FixedBound
    from deepseek.optim.optimizers import OptimizerConfig, build_optimizer
    from deepseek.train.config import TrainConfig
    from deepseek.train.run_state import compile_blocks_
    from deepseek.train.steps import take_step
    from deepseek.train.tasks.causal_lm import CausalLM

    model = build_model()
    optimizer = build_optimizer(model, OptimizerConfig(), LEARNING_RATE)
    precision = choose_precision("auto", torch.device("cpu"))
    if is_compiled:
        compile_blocks_(model)
    task, bound = CausalLM(TrainConfig()), FixedBound(GRAD_CLIP)

    def step(rows_BT: Tensor) -> float:
        batch = Batch(rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous(), BATCH_SIZE * LENGTH)
        return take_step(task, model, optimizer, [batch], precision=precision, bound=bound).loss

    return take_rounds(step, num_steps)


def train_plainly(num_steps: int, *, is_fast: bool) -> Iterator[Round]:
    """Train by the loop that one writes by hand: eager FP32, or compiled in what is faster here."""
    import torch

    from deepseek.mixed_precision.forward_precision import choose_precision

    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    run = torch.compile(model) if is_fast else model
    precision = choose_precision("auto" if is_fast else "fp32", torch.device("cpu"))

    def step(rows_BT: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits_BTV = run(rows_BT[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return take_rounds(step, num_steps)


def take_rounds(step: Callable[[Tensor], float], num_steps: int) -> Iterator[Round]:
    """Take `num_steps` steps in each round."""
    tokens = random_tokens(0)
    while True:
        losses = [step(next(tokens)) for _ in range(num_steps)]
        yield num_steps * BATCH_SIZE * LENGTH, losses


@dataclass(frozen=True)
class Rows:
    """Rows of random tokens in the form that the Trainer reads."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        import torch

        generator = torch.Generator().manual_seed(index)
        tokens_T = torch.randint(0, SHAPE["vocab_size"], (LENGTH,), generator=generator)
        return {"input_ids": tokens_T, "labels": tokens_T}


def train_with_trainer(num_steps: int, **settings: bool) -> None:
    """Train `LlamaForCausalLM` with the Trainer, which has the loop itself: a callback ends the rounds."""
    import torch
    import transformers

    turns = Turns()

    class Rounds(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % num_steps == 0:
                turns.answer(num_steps * BATCH_SIZE * LENGTH, [])
                control.should_training_stop = not turns.wait()

    if not turns.wait():
        return
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        max_position_embeddings=SHAPE["max_length"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=transformers.LlamaForCausalLM(config),
            args=transformers.TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                per_device_train_batch_size=BATCH_SIZE,
                max_steps=MORE_STEPS,
                learning_rate=LEARNING_RATE,
                max_grad_norm=GRAD_CLIP,
                optim="adamw_torch_fused",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Rows(MORE_STEPS * BATCH_SIZE),
            callbacks=[Rounds()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


SIDES: dict[str, Callable[[int], Iterator[Round] | None]] = {
    "deepseek": lambda num_steps: train_ours(num_steps, is_compiled=False),
    "deepseek compiled": lambda num_steps: train_ours(num_steps, is_compiled=True),
    "plain loop fp32": lambda num_steps: train_plainly(num_steps, is_fast=False),
    "plain loop compiled": lambda num_steps: train_plainly(num_steps, is_fast=True),
    "Trainer fp32": lambda num_steps: train_with_trainer(num_steps, bf16=False, torch_compile=False),
    "Trainer bf16": lambda num_steps: train_with_trainer(num_steps, bf16=True, torch_compile=False),
    "Trainer bf16 compiled": lambda num_steps: train_with_trainer(num_steps, bf16=True, torch_compile=True),
}

if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # the order of a side
        ordered = json.loads(sys.argv[1])
        rounds = SIDES[ordered["side"]](ordered["num_steps"])
        if rounds is not None:
            serve(rounds)
    else:
        main()
