"""ResNet-152 under jit against eager: a training step and inference, +37 % speed and -42 % peak memory in each.

Eager is the model as it is written, in FP32, with torch's defaults. Ours: images channels-last, and each repeated block
compiled by `ds.jit` (blocks of one shape are compiled once), in FP32 with a memory budget for the backward pass, and in
bf16 by autocast without and with one. For inference the fused kernels of `compiler.fusion`, in FP32 and bf16, and
`ds.jit` of the whole model. Layers of an encoder and a decoder follow in the same way, with smaller gains to expect.

Rows are items (images, sequences) per second. Rows of memory are MB: weights, gradients and optimizer state, and the
peak that torch's allocator hands out above what was there before the step; compiling counts for neither. On all sides
freed memory stays with the process (`core.allocator`), so that page faults do not favour whoever frees less.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Bar, Row, Side, measure, parse_arguments, report
from deepseek.checkpoint.activations import find_blocks
from deepseek.compiler.jit.decorator import jit
from deepseek.compiler.passes.fusion.rewrite_rules import fuse
from deepseek.compiler.passes.memory.peak_tracking import measure_peak_bytes
from deepseek.compiler.passes.memory.recomputation import inductor_with_budget
from deepseek.core.allocator import keep_freed_memory
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.zoo import build, settle_

BUDGET = 0.5
MAX_SHAPES = 64  # blocks of different shapes that share their code
SPEED_GOAL, MEMORY_GOAL = 1.37, 0.58
EAGER = "eager fp32"


@dataclass(frozen=True)
class Work:
    """A model and a batch for it."""

    name: str
    build: Callable[[], nn.Module]
    make_inputs: Callable[[], Tensor]
    num_items: int


@dataclass(frozen=True)
class Way:
    """One way of running a model: what becomes of it, of its inputs, and in which precision."""

    name: str
    prepare: Callable[[nn.Module, Tensor], Callable[..., Tensor]]
    is_bf16: bool = False


def main() -> None:
    """Measure all ways of all works and report."""
    arguments = parse_arguments(__doc__ or "")
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = MAX_SHAPES
    rows: list[Row] = []
    bars: list[Bar] = []
    for work in list_works(is_quick=arguments.quick):
        for is_training, ways in ((True, TRAINING), (False, INFERENCE)):
            chosen = (ways[0], *ways[-2:]) if arguments.quick else ways
            measured = compare(work, chosen, is_training=is_training, num_rounds=1 if arguments.quick else 5)
            rows += measured
            bars += judge(measured)
            torch._dynamo.reset()
            gc.collect()
    report("jit", "items/s (rows of memory: MB)", rows, bars, arguments)


def list_works(*, is_quick: bool) -> list[Work]:
    """The model of the claim, and two of another kind."""
    name, batch, size = ("resnet18", 2, 64) if is_quick else ("resnet152", 16, 224)
    length, width, layers = (32, 64, 2) if is_quick else (128, 768, 4)
    decoder = DecoderConfig(vocab_size=1024, num_layers=layers, hidden_size=width, num_heads=8, max_length=length)
    images, vectors = torch.randn(batch, 3, size, size), torch.randn(8, length, width)
    tokens = torch.randint(0, 1024, (8, length))
    return [
        Work(name, lambda: settle_(build(name), images), lambda: images, batch),
        Work("encoder", lambda: build_encoder(width, layers), lambda: vectors, 8),
        Work("decoder", lambda: Decoder(decoder), lambda: tokens, 8),
    ]


def build_encoder(width: int, num_layers: int) -> nn.Module:
    """Layers of the size of BERT's."""
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.1, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)


def compile_blocks(budget: float) -> Callable[[nn.Module, Tensor], Callable[..., Tensor]]:
    """Repeated blocks by `ds.jit`, keeping that share for the backward pass."""

    def prepare(model: nn.Module, inputs: Tensor) -> Callable[..., Tensor]:
        arrange(model)
        for path in find_blocks(model):
            parent, _, name = path.rpartition(".")
            block = jit(model.get_submodule(path), dynamic=False, backend=inductor_with_budget(budget))
            setattr(model.get_submodule(parent), name, block)
        return model

    return prepare


def compile_whole(model: nn.Module, inputs: Tensor) -> Callable[..., Tensor]:
    """Return the model as one graph."""
    return jit(arrange(model), dynamic=False)


def fuse_kernels(model: nn.Module, inputs: Tensor) -> Callable[..., Tensor]:
    """Fused kernels, without generated code; the model itself is let go."""
    example = inputs.to(next(model.parameters()).dtype) if inputs.is_floating_point() else inputs
    return fuse(model, (lay_out(example),)).graph_module


def arrange(model: nn.Module) -> nn.Module:
    """Return the weights of images with their channels last."""
    is_visual = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return model.to(memory_format=torch.channels_last) if is_visual else model


def lay_out(inputs: Tensor) -> Tensor:
    """Images with their channels last; anything else as it is."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


TRAINING = (
    Way(EAGER, lambda model, _: model),
    Way("eager fp32, channels last", lambda model, _: arrange(model)),
    Way("jit fp32", compile_blocks(1.0)),
    Way(f"jit fp32, budget {BUDGET}", compile_blocks(BUDGET)),
    Way("jit bf16", compile_blocks(1.0), is_bf16=True),
    Way(f"jit bf16, budget {BUDGET}", compile_blocks(BUDGET), is_bf16=True),
)
INFERENCE = (
    Way(EAGER, lambda model, _: model),
    Way("eager fp32, channels last", lambda model, _: arrange(model)),
    Way("fused fp32", fuse_kernels),
    Way("jit fp32", compile_whole),
    Way("fused bf16", fuse_kernels, is_bf16=True),
)


def compare(work: Work, ways: tuple[Way, ...], *, is_training: bool, num_rounds: int) -> list[Row]:
    """Rates of all ways in turns, then the memory of each."""
    prefix = f"{work.name} {'training' if is_training else 'inference'}: "
    runs = {way.name: (train if is_training else infer)(work, way) for way in ways}
    sides = [Side(prefix + name, timed(run, work.num_items)) for name, (run, _) in runs.items()]
    rows = measure(sides, num_rounds=num_rounds)
    for name, (run, count_resident) in runs.items():
        megabytes = measure_memory(run, count_resident)
        rows.append(Row(f"{prefix}{name}, memory", megabytes, megabytes, megabytes, "one step"))
    return rows


def train(work: Work, way: Way) -> tuple[Callable[[], object], Callable[[], int]]:
    """A step with SGD and momentum; and the bytes that are there before it."""
    torch.manual_seed(0)
    model = work.build().train()
    inputs = work.make_inputs()
    forward = way.prepare(model, inputs)
    inputs = inputs if way.name == EAGER else lay_out(inputs)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if way.is_bf16 else nullcontext():
            output = forward(inputs)
        F.mse_loss(output.float(), torch.zeros_like(output, dtype=torch.float32)).backward()
        optimizer.step()

    def count_resident() -> int:
        optimizer.zero_grad(set_to_none=True)
        return 2 * sum(parameter.nbytes for parameter in parameters) + sum(buffer.nbytes for buffer in model.buffers())

    return step, count_resident


def infer(work: Work, way: Way) -> tuple[Callable[[], object], Callable[[], int]]:
    """One batch without gradients; and the bytes of the weights."""
    torch.manual_seed(0)
    model = work.build().eval()
    inputs = work.make_inputs()
    if way.is_bf16:
        model = model.bfloat16()
        inputs = inputs.bfloat16() if inputs.is_floating_point() else inputs
    weights_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        forward = way.prepare(model, inputs)
    inputs = inputs if way.name == EAGER else lay_out(inputs)

    def run() -> None:
        with torch.no_grad():
            forward(inputs)

    return run, lambda: weights_bytes


def timed(run: Callable[[], object], num_items: int) -> Callable[[], float]:
    """`run` as a rate in items per second."""

    def rate() -> float:
        began_s = time.perf_counter()
        run()
        return num_items / (time.perf_counter() - began_s)

    return rate


def measure_memory(run: Callable[[], object], count_resident: Callable[[], int]) -> float:
    """MB that are there before and taken during one more step."""
    resident_bytes = count_resident()
    return (resident_bytes + measure_peak_bytes(run).peak_bytes) / 1e6


def judge(rows: list[Row]) -> list[Bar]:
    """Return the fastest of ours, and the one of ours that takes least memory while it is as fast as the bar asks."""
    medians = {row.name: row.median or 0.0 for row in rows}
    eager = next(name for name in medians if name.endswith(EAGER))
    prefix = eager.removesuffix(EAGER)
    ours = [name for name in medians if f"{name}, memory" in medians and ": eager" not in name]
    speeds = {name: medians[name] / medians[eager] for name in ours}
    fastest = max(ours, key=lambda name: speeds[name])
    quick_enough = [name for name in ours if speeds[name] >= SPEED_GOAL] or [fastest]
    leanest = min(quick_enough, key=lambda name: medians[f"{name}, memory"])
    shares = {name: medians[f"{name}, memory"] / medians[f"{eager}, memory"] for name in ours}
    return [
        Bar(f"{prefix}speed of {fastest.removeprefix(prefix)} / eager", speeds[fastest], SPEED_GOAL),
        Bar(f"{prefix}memory of {leanest.removeprefix(prefix)} / eager", shares[leanest], MEMORY_GOAL, at_least=False),
    ]


if __name__ == "__main__":
    main()
