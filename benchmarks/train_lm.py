"""Training a dense 12 M decoder: tokens/s against plain loops of PyTorch and the transformers Trainer.

At least 2x a plain eager FP32 loop, 1.1x the plain loop compiled, and 1.2x the Trainer.

Every side trains the same Llama shape on the same random tokens with AdamW and clipping: this framework's step (eager
and with compiled blocks), a plain PyTorch loop in FP32 and the usual way to speed it up (compile and autocast), and the
`transformers` Trainer in FP32, in bf16, and in bf16 compiled, of which the best counts. What is timed are steps in the
middle of training; compiling and setting up are not.

Ours and the compiled plain loop compute in what is faster here, bf16 or FP32, as `precision=auto` chooses. On a CPU
without instructions for bf16 that is FP32: a plain loop in bf16 takes minutes a step there and would be no peer, and
the Trainer's bf16 sides are left out. In FP32 three quarters of a step are matmuls, at the same speed on all sides.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.measuring import Bar, Row, Side, measure, parse_arguments, ratio, report
from deepseek.data.batching import Batch
from deepseek.mixed_precision.forward_precision import choose_precision
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.optim.clipping import FixedBound
from deepseek.optim.optimizers import OptimizerConfig, build_optimizer
from deepseek.train.config import TrainConfig
from deepseek.train.steps import take_step
from deepseek.train.tasks.causal_lm import CausalLM

CONFIG = DecoderConfig(
    vocab_size=4096,
    num_layers=6,
    hidden_size=384,
    num_heads=6,
    num_kv_heads=6,
    ffn_size=1024,
    max_length=256,
)
BATCH_SIZE, LENGTH, LEARNING_RATE, GRAD_CLIP = 8, 256, 1e-3, 1.0


def main() -> None:
    """Measure all sides and report."""
    arguments = parse_arguments(__doc__ or "")
    num_steps, num_rounds = (3, 1) if arguments.quick else (8, 5)
    rows = measure(build_sides(num_steps), num_rounds=num_rounds)
    best = best_of(rows, "deepseek")
    bars = [
        Bar("ours / plain eager FP32", ratio(rows, best, "plain loop fp32"), 2.0),
        Bar("ours / plain compiled", ratio(rows, best, "plain loop compiled"), 1.1),
        Bar("ours / best of the Trainer", ratio(rows, best, best_of(rows, "Trainer")), 1.2),
    ]
    report("train_lm", "tokens/s", rows, bars, arguments)


def build_sides(num_steps: int) -> list[Side]:
    """All sides, each with a model of its own that goes on learning from round to round."""
    is_bf16_fast = choose_precision("auto", torch.device("cpu")) == "bf16"
    ran = "in bf16" if is_bf16_fast else "in FP32, which is faster here"

    def trainer_in_bf16(*, torch_compile: bool) -> Side:
        name = f"Trainer bf16{' compiled' if torch_compile else ''}"
        if not is_bf16_fast:
            return Side(name, None, "bf16 is slower than FP32 here")
        return Side(name, trainer(num_steps, bf16=True, torch_compile=torch_compile))

    return [
        Side("deepseek", our_loop(num_steps, compiled=False), ran),
        Side("deepseek compiled", our_loop(num_steps, compiled=True), ran),
        Side("plain loop fp32", plain_loop(num_steps, is_fast=False)),
        Side("plain loop compiled", plain_loop(num_steps, is_fast=True), ran),
        Side("Trainer fp32", trainer(num_steps, bf16=False, torch_compile=False)),
        trainer_in_bf16(torch_compile=False),
        trainer_in_bf16(torch_compile=True),
    ]


def best_of(rows: list[Row], prefix: str) -> str:
    """Return the name of the fastest side whose name begins so."""
    return max((row for row in rows if row.name.startswith(prefix)), key=lambda row: row.median or 0).name


def random_tokens(seed: int) -> Iterator[Tensor]:
    """(B, T + 1) tokens without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, CONFIG.vocab_size, (BATCH_SIZE, LENGTH + 1), generator=generator)


def our_loop(num_steps: int, *, compiled: bool) -> Callable[[], float]:
    """This framework's step."""
    torch.manual_seed(0)
    model = Decoder(CONFIG).train()
    optimizer = build_optimizer(model, OptimizerConfig(), LEARNING_RATE)
    precision = choose_precision("auto", torch.device("cpu"))
    if compiled:
        for layer in model.layers:
            layer.compile()
    tokens, task, bound = random_tokens(0), CausalLM(TrainConfig()), FixedBound(GRAD_CLIP)

    def step() -> None:
        rows_BT = next(tokens)
        batch = Batch(rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous(), BATCH_SIZE * LENGTH)
        take_step(task, model, optimizer, [batch], precision=precision, bound=bound)

    return timed(step, num_steps)


def plain_loop(num_steps: int, *, is_fast: bool) -> Callable[[], float]:
    """Build the loop that one writes by hand: eager FP32, or compiled in what is faster here."""
    torch.manual_seed(0)
    model: nn.Module = Decoder(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    run = torch.compile(model) if is_fast else model
    tokens = random_tokens(0)
    precision = choose_precision("auto" if is_fast else "fp32", torch.device("cpu"))

    def step() -> None:
        rows_BT = next(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits_BTV = run(rows_BT[:, :-1])
        loss = nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, num_steps)


def timed(step: Callable[[], None], num_steps: int) -> Callable[[], float]:
    """`num_steps` steps as a rate in tokens per second."""

    def rate() -> float:
        began_s = time.perf_counter()
        for _ in range(num_steps):
            step()
        return num_steps * BATCH_SIZE * LENGTH / (time.perf_counter() - began_s)

    return rate


class Clock(transformers.TrainerCallback):
    """Notes when each optimizer step ended."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self.ends_s.append(time.perf_counter())


@dataclass(frozen=True)
class Rows:
    """Rows of random tokens in the form that the Trainer reads."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens_T = torch.randint(0, CONFIG.vocab_size, (LENGTH,), generator=generator)
        return {"input_ids": tokens_T, "labels": tokens_T}


def trainer(num_steps: int, **settings: bool) -> Callable[[], float]:
    """The `transformers` Trainer on `LlamaForCausalLM`; the first step of each round is not timed."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.ffn_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.kv_heads,
        max_position_embeddings=CONFIG.max_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)

    def rate() -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                per_device_train_batch_size=BATCH_SIZE,
                max_steps=num_steps + 1,
                learning_rate=LEARNING_RATE,
                max_grad_norm=GRAD_CLIP,
                optim="adamw_torch_fused",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **copy.copy(settings),
            )
            worker = transformers.Trainer(
                model=model,
                args=arguments,
                train_dataset=Rows(10_000),
                callbacks=[clock],  # type: ignore[arg-type]
            )
            worker.remove_callback(transformers.PrinterCallback)
            worker.train()
        elapsed_s = clock.ends_s[-1] - clock.ends_s[0]
        return (len(clock.ends_s) - 1) * BATCH_SIZE * LENGTH / elapsed_s

    return rate


if __name__ == "__main__":
    main()
