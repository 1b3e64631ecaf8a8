"""Beside one busy process training and decoding keep 0.45x of their speed, beside four they are 4x as fast as before.

Jobs: steps of a small training loop, decoding of one sequence, completions from a server over HTTP, and a ResNet-50.
Each runs beside 0, 1 and 4 processes that do nothing but keep a core busy, once as torch comes and once with OpenMP's
threads that sleep soon while others want their cores, as the commands have it (`deepseek.core.openmp`). Every job and
side has three processes of its own, since two that do the same differ by a tenth from their start to their end; rounds
go through them. The sides of a job take turns in each round, and each is counted from a second and a half after the
busy processes began, when the change has been noticed. Needs a machine on which nothing else works, with more
than one core: OpenMP's threads only wait for each other where there are several.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.core.openmp import SPIN_BOUNDS, yield_cores

if TYPE_CHECKING:
    from deepseek.data.tokenizing import Tokenizer
    from deepseek.models.decoder.model import Decoder

NUM_BUSY = (0, 1, 4)
NUM_TOKENS = 8
START_TIMEOUT_S = 600.0
JOB_OPTION = "--job"  # how this file calls itself in a fresh process
# What GNU's runtime does where nothing is set; said out loud, so that the server's command leaves it alone.
TODAY = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
YIELDING, PLAIN = "yielding", "as torch comes"
SETTLING_S = 1.5
TEXT = "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x: int = 0\n"


def main() -> None:
    """Measure every job, load and side in turns, and report."""
    from benchmarks.measuring import Bar, Side, measure, parse_arguments, ratio, report

    arguments = parse_arguments(__doc__ or "")
    slice_s, num_rounds, num_processes = (0.5, 1, 1) if arguments.quick else (3.0, 6, 3)
    rows = []
    for job in JOBS:  # one after the other, since processes that wait for their turn disturb a little, too
        with ExitStack() as stack:
            workers = {
                side: [stack.enter_context(working(job, environment)) for _ in range(num_processes)]
                for side, environment in ((PLAIN, TODAY), (YIELDING, {}))
            }
            sides = [
                Side(name_row(job, num_busy, side), partial(rate_of_next, cycle(workers[side]), num_busy, slice_s))
                for num_busy in NUM_BUSY
                for side in (PLAIN, YIELDING)
            ]
            rows += measure(sides, num_rounds=num_rounds)

    def over(job: str, num_busy: int, side: str, reference_busy: int, reference: str) -> float | None:
        return ratio(rows, name_row(job, num_busy, side), name_row(job, reference_busy, reference))

    bars = [
        *(
            Bar(f"{job} beside 1 / alone", over(job, 1, YIELDING, 0, YIELDING), 0.45)
            for job in ("training", "decoding")
        ),
        *(Bar(f"{job} beside 4 / before", over(job, 4, YIELDING, 4, PLAIN), 4.0) for job in ("training", "decoding")),
        *(Bar(f"{job} alone / before", over(job, 0, YIELDING, 0, PLAIN), 0.97) for job in JOBS),
    ]
    report("under_load", "per second", rows, bars, arguments)


def name_row(job: str, num_busy: int, side: str) -> str:
    """Return the name of a row of the table."""
    return f"{job} beside {num_busy}, {side}"


@contextmanager
def working(job: str, environment: dict[str, str]) -> Iterator[Callable[[float], float]]:
    """A process that does `job` for so many seconds when it is asked to, and answers with its rate."""
    unset = {*SPIN_BOUNDS, "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-m", "benchmarks.under_load", JOB_OPTION, job]
    with subprocess.Popen(
        command, env=clean | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def rate(duration_s: float) -> float:
            with suppress(BrokenPipeError):  # it is gone: there is no answer then
                stdin.write(f"{duration_s}\n")
                stdin.flush()
            answer = stdout.readline()
            if not answer:
                raise RuntimeError(f"the process of {job} ended with status {process.wait()}; see its messages above")
            return float(answer)

        try:
            yield rate
        finally:
            with suppress(BrokenPipeError):
                stdin.close()  # which ends it


def rate_of_next(rates: Iterator[Callable[[float], float]], num_busy: int, duration_s: float) -> float:
    """Return the rate of the next process of a side while `num_busy` others keep a core busy each."""
    return rate_beside(next(rates), num_busy, duration_s)


def rate_beside(rate: Callable[[float], float], num_busy: int, duration_s: float) -> float:
    """Return the rate of a job while `num_busy` processes keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
    try:
        rate(SETTLING_S)
        return rate(duration_s)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def work(job: str) -> None:
    """In a process of its own: do `job` for as long as each line of standard input says, and print its rate."""
    with JOBS[job]() as do:
        do()  # compiles, packs, fills caches
        for line in sys.stdin:
            count, began_s = 0.0, time.perf_counter()
            while (elapsed_s := time.perf_counter() - began_s) < float(line):
                count += do()
            print(count / elapsed_s, flush=True)


@contextmanager
def training() -> Iterator[Callable[[], float]]:
    """Optimizer steps of a decoder of two layers, 8 rows of 64 tokens each."""
    import torch

    from deepseek.data.batching import Batch
    from deepseek.models.decoder.model import Decoder, DecoderConfig
    from deepseek.optim.clipping import FixedBound
    from deepseek.optim.optimizers import OptimizerConfig, build_optimizer
    from deepseek.train.config import TrainConfig
    from deepseek.train.steps import take_step
    from deepseek.train.tasks.causal_lm import CausalLM

    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=512, num_layers=2, hidden_size=128, num_heads=4, ffn_size=384)).train()
    optimizer = build_optimizer(model, OptimizerConfig(), 1e-3)
    tokens_BT = torch.randint(0, 512, (8, 65))
    batch = Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous(), 8 * 64)
    task, bound = CausalLM(TrainConfig()), FixedBound(1.0)

    def step() -> float:
        take_step(task, model, optimizer, [batch], precision="fp32", bound=bound)
        return 1.0

    yield step


def build_decoder() -> tuple[Decoder, Tokenizer]:
    """Return a decoder with random weights of the quickstart's size, without its experts, and a tokenizer."""
    import torch

    from deepseek.data.tokenizing import train_tokenizer
    from deepseek.models.decoder.model import Decoder, DecoderConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so little text does not give all the tokens
        tokenizer = train_tokenizer([TEXT], vocab_size=320)
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=4096, num_layers=4, hidden_size=256, num_heads=4, num_kv_heads=2, ffn_size=768, max_length=128
    )
    return Decoder(config).eval(), tokenizer


@contextmanager
def decoding() -> Iterator[Callable[[], float]]:
    """Tokens of one sequence, from the engine."""
    from deepseek.nn.packed import pack_
    from deepseek.serve.config import EngineConfig
    from deepseek.serve.engine import Engine

    model, tokenizer = build_decoder()
    engine = Engine(pack_(model), tokenizer, EngineConfig(max_num_seqs=1))

    def generate() -> float:
        (generation,) = engine.generate([[1, 2, 3]], max_tokens=NUM_TOKENS, ignore_eos=True)
        return float(len(generation.tokens))

    yield generate


@contextmanager
def serving() -> Iterator[Callable[[], float]]:
    """Completions of a few tokens from a server in a process of its own, over HTTP."""
    from deepseek.models.loading import save_model
    from deepseek.recipes.server_probe import complete, server_process

    model, tokenizer = build_decoder()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", tokenizer=tokenizer)
        with server_process(Path(folder) / "model", start_timeout_s=START_TIMEOUT_S) as url:

            def ask() -> float:
                complete(url, "def add", max_tokens=NUM_TOKENS, timeout_s=START_TIMEOUT_S)
                return 1.0

            yield ask


@contextmanager
def resnet() -> Iterator[Callable[[], float]]:
    """Passes of a ResNet-50 over one image."""
    import torch

    from deepseek.models import zoo

    torch.manual_seed(0)
    model = zoo.build("resnet50").eval()
    image = torch.randn(1, 3, 224, 224)

    def run() -> float:
        with torch.inference_mode():
            model(image)
        return 1.0

    yield run


JOBS = {"training": training, "decoding": decoding, "serving": serving, "resnet": resnet}

if __name__ == "__main__":
    if JOB_OPTION in sys.argv:
        yield_cores()  # as the commands do; what the environment says about waiting stays
        work(sys.argv[-1])
    else:
        main()
