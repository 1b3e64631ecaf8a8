"""Masked language modeling of a BERT: tokens/s >= 1.2x the `transformers` Trainer at the same settings.

    python -m benchmarks.train_tasks masked_lm

Both train the BERT of the recipe `bert_small` (4 layers, 256 channels, 8,192 tokens) on the same rows of 128 tokens of
the standard library's text with AdamW and clipping, ours by `deepseek.train.train`, the other by `Trainer` with
`DataCollatorForLanguageModeling` and torch's fused AdamW. Ours chooses its precision; the Trainer runs in FP32 and,
where the processor has instructions for it, in bf16, and the better one counts. Each is a process of its own. Tokens
are those of the rows, hidden or not. Which tokens are hidden is drawn by each for itself, so the losses, which the
table has, are alike and not equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.measuring import Bar, Side, measure, ratio, report
from benchmarks.training.turns import Round, RunningSide, Turns, serve, set_up_as_the_command_does, started

OURS, TRAINER, TRAINER_BF16 = "deepseek", "Trainer fp32", "Trainer bf16"
BATCH_SIZE, LENGTH, LEARNING_RATE, GRAD_CLIP = 16, 128, 1e-3, 1.0
NUM_MODULES = 60  # of the standard library: enough for a vocabulary
STEPS_PER_ROUND = 6
MORE_STEPS = 100_000  # than any side takes here


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this section."""
    measuring.add_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure all sides and report."""
    import torch

    from deepseek.mixed_precision.forward_precision import has_native_bf16

    running: dict[str, RunningSide] = {}
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        prepare(Path(folder))
        for name in (OURS, TRAINER, TRAINER_BF16):
            if name == TRAINER_BF16 and not has_native_bf16(torch.device("cpu")):
                sides.append(Side(name, None, "this processor has no bf16 instructions"))
                continue
            order = {"side": name, "folder": folder}
            running[name] = stack.enter_context(started("benchmarks.training.masked_lm", order))
            sides.append(Side(name, running[name].rate))
        rows = measure(sides, num_rounds=1 if arguments.quick else 5)
    losses = {name: statistics.fmean(side.losses[-STEPS_PER_ROUND:]) for name, side in running.items()}
    rows = [replace(row, note=f"loss {losses[row.name]:.3f}") if row.name in losses else row for row in rows]
    best = max(rows[1:], key=lambda row: row.median or 0).name
    bars = [
        Bar("ours / best of the Trainer", ratio(rows, OURS, best), 1.2),
        Bar("difference of the last round's loss", abs(losses[OURS] / losses[TRAINER] - 1), 0.1, at_least=False),
    ]
    report("train_tasks masked_lm", f"tokens/s of {BATCH_SIZE} x {LENGTH}", rows, bars, arguments)


def configure(folder: Path) -> Any:
    """Return the recipe's config at the settings of both sides."""
    from deepseek.recipes import load_recipe

    return load_recipe("bert_small").override(
        {
            "folder": str(folder / "run"),
            "data.sources": [str(folder / "text")],
            "data.heldout_fraction": 0.0,
            "data.batch_size": BATCH_SIZE,
            "data.sequence_length": LENGTH,
            "optimizer.base_learning_rate": LEARNING_RATE,
            "optimizer.reference_batch_size": BATCH_SIZE,
            "optimizer.betas": (0.9, 0.999),
            "optimizer.weight_decay": 0.0,
            "optimizer.grad_clip": GRAD_CLIP,
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": 0,
            "num_steps": MORE_STEPS,
            "evaluate_every": 0,
            "log_every": 1,
        }
    )


def prepare(folder: Path) -> None:
    """Write the text, train the tokenizer and tokenize, which is no part of what is measured."""
    from deepseek.train.tasks.masked_lm import MaskedLM

    (folder / "text").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:NUM_MODULES]:
        (folder / "text" / path.name).write_bytes(path.read_bytes())
    for _ in MaskedLM(configure(folder)).prepare(folder / "run" / "data"):
        pass


# ---- the sides, each in its process


def train_ours(folder: Path) -> Iterator[Round]:
    """Train with the trainer, in a process set up as the command line does."""
    set_up_as_the_command_does()
    from deepseek.train import train

    losses: list[float] = []
    for event in train(configure(folder)):
        if event.kind == "step_done":
            losses.append(event.loss)
        if len(losses) == STEPS_PER_ROUND:
            yield BATCH_SIZE * LENGTH * len(losses), losses
            losses = []


def train_theirs(folder: Path, *, is_bf16: bool) -> None:
    """Train with the Trainer, which has the loop itself: a callback of it ends the rounds."""
    import torch
    import transformers

    from deepseek.data.corpus import load_data

    config, turns, losses = configure(folder), Turns(), []
    data = load_data(config.data, folder / "run" / "data", is_verified=True)

    class Rounds(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % STEPS_PER_ROUND == 0:
                turns.answer(BATCH_SIZE * LENGTH * STEPS_PER_ROUND, [loss.item() for loss in losses])
                losses.clear()
                control.should_training_stop = not turns.wait()

    class Trainer(transformers.Trainer):
        def training_step(self, *positional: Any, **named: Any) -> torch.Tensor:
            losses.append(super().training_step(*positional, **named))
            return losses[-1]

    if not turns.wait():
        return
    torch.manual_seed(config.seed)
    special = {
        name: data.tokenizer.special_tokens[name] for name in ("cls_token", "sep_token", "pad_token", "mask_token")
    }
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=data.tokenizer.backend, **special)
    shape = transformers.BertConfig(vocab_size=data.tokenizer.vocab_size, **config.init_settings)
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    tokens_N = torch.tensor(data.train.tokens[:].astype("int64"))
    rows = [{"input_ids": [begin, *row.tolist(), end]} for row in tokens_N.split(LENGTH - 2) if len(row) == LENGTH - 2]
    Trainer(
        model=transformers.BertForMaskedLM(shape),
        args=transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            use_cpu=True,
            bf16=is_bf16,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=MORE_STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=GRAD_CLIP,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15),
        callbacks=[Rounds()],
    ).train()


if __name__ == "__main__":
    ordered = json.loads(sys.argv[1])
    if ordered["side"] == OURS:
        serve(train_ours(Path(ordered["folder"])))
    else:
        train_theirs(Path(ordered["folder"]), is_bf16=ordered["side"] == TRAINER_BF16)
