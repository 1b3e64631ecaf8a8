"""Greedy decoding of SmolLM2-135M: int8 at least 3x, FP32 at least 1.3x the tokens per second of transformers.

Sides: this framework's engine in FP32, bf16 and int8; `transformers` generate in FP32 and bf16 on the same weights; and
llama.cpp on the GGUF file itself, whose 4-bit weights are a quarter of int8's half. One prompt, one sequence, the same
number of new tokens for all, prompt reading included. Checked as well: FP32 writes the same tokens as transformers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks.measuring import Bar, Side, measure, parse_arguments, ratio, report
from deepseek.core.extras import has_library
from deepseek.data.tokenizing import load_tokenizer
from deepseek.models.loading import load_model, make_int8_
from deepseek.nn.packed import pack_
from deepseek.serve.config import EngineConfig
from deepseek.serve.engine import Engine
from tests.models.smollm2 import find_gguf, write_huggingface_folder

PROMPT = "The history of the steam engine begins in the first century, when"
NUM_TOKENS = 64
MAX_LENGTH = 256


def main() -> None:
    """Measure all sides and report."""
    arguments = parse_arguments(__doc__ or "")
    num_tokens, num_rounds = (16, 2) if arguments.quick else (NUM_TOKENS, 7)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_huggingface_folder(folder)
        sides, ours, theirs = build_sides(folder, num_tokens)
        rows = measure(sides, num_rounds=num_rounds)
        print("FP32 writes the tokens that transformers writes:", ours() == theirs())
    best = max((row for row in rows if row.name.startswith("deepseek")), key=lambda row: row.median or 0)
    bars = [
        Bar("best of ours / transformers FP32", ratio(rows, best.name, "transformers fp32"), 3.0),
        Bar("best of ours / best of transformers", _over_best_transformers(rows, best.name), 1.0),
        Bar("FP32 / transformers FP32", ratio(rows, "deepseek fp32", "transformers fp32"), 1.3),
        Bar("best of ours / llama.cpp", ratio(rows, best.name, "llama.cpp Q4_1"), 1.0),
    ]
    report("generate", "tokens/s", rows, bars, arguments)


def build_sides(folder: Path, num_tokens: int) -> tuple[list[Side], Callable[[], list[int]], Callable[[], list[int]]]:
    """All sides, and what ours and transformers write in FP32."""
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode(PROMPT)
    config = EngineConfig(max_num_seqs=1, max_length=MAX_LENGTH)
    engines = {
        "fp32": Engine(load_model(folder, precision="fp32", packed=True), tokenizer, config),
        "bf16": Engine(load_model(folder, precision="bf16", packed=True), tokenizer, config),
        "int8": Engine(pack_(make_int8_(load_model(folder, precision="fp32"))), tokenizer, config),
    }
    peers = {
        name: transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }

    def ours(name: str) -> list[int]:
        (generation,) = engines[name].generate([prompt], max_tokens=num_tokens, ignore_eos=True)
        return [token.id for token in generation.tokens]

    @torch.inference_mode()
    def theirs(name: str) -> list[int]:
        tokens = torch.tensor([prompt])
        length = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        written = peers[name].generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **length)
        return list(written[0, len(prompt) :].tolist())

    sides = [Side(f"deepseek {name}", timed(lambda name=name: ours(name), num_tokens)) for name in engines]
    sides += [Side(f"transformers {name}", timed(lambda name=name: theirs(name), num_tokens)) for name in peers]
    sides.append(llama_cpp_side(prompt, num_tokens))
    return sides, lambda: ours("fp32"), lambda: theirs("fp32")


def timed(run: Callable[[], object], num_tokens: int) -> Callable[[], float]:
    """`run` as a rate in tokens per second."""

    def rate() -> float:
        began_s = time.perf_counter()
        run()
        return num_tokens / (time.perf_counter() - began_s)

    return rate


def llama_cpp_side(prompt: list[int], num_tokens: int) -> Side:
    """llama.cpp on the GGUF, where its Python package is installed (see benchmarks/peers.txt)."""
    if not has_library("llama_cpp"):
        return Side("llama.cpp Q4_1", None, "llama-cpp-python is not installed")
    import llama_cpp

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(find_gguf()), n_ctx=MAX_LENGTH, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run() -> None:
        model.reset()
        for count, _ in enumerate(model.generate(prompt, temp=0.0), start=1):
            if count == num_tokens:
                return

    return Side("llama.cpp Q4_1", timed(run, num_tokens), "4-bit weights")


def _over_best_transformers(rows: list, name: str) -> float | None:  # type: ignore[type-arg]
    ratios = [ratio(rows, name, reference) for reference in ("transformers fp32", "transformers bf16")]
    return min((speedup for speedup in ratios if speedup is not None), default=None)


if __name__ == "__main__":
    main()
