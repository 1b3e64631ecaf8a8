"""Pipelines wait as long as the planner says: steps within 5 % of its simulation, and gradients of inputs in 0.65 of B.

Sides: every schedule on 2 and 4 local ranks, cut by `parallelize`'s own parts and played with real messages. The layers
sleep, as long for the forward pass as for the gradients of inputs and of weights (zero bubble's assumption), so that
ranks need no cores of their own. On 2 ranks also layers that multiply matrices, whose passes are timed alone before.
The simulation is told the seconds of passes, and of a message both ways, halved. Steps are those of the slowest rank,
and the fastest of all rounds counts: on a machine that is shared, waiting for a core is no bubble.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.measuring import Bar, Row, parse_arguments, report
from deepseek.bench.plan_parity import launch
from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.parallel.parallel_model import ModelRows, cut
from deepseek.distributed.parallel.pipeline import PipelineStage, Received, TakenOut
from deepseek.distributed.parallel.weight_gradients import accumulate_, split_backward_
from deepseek.distributed.plan import Plan
from deepseek.planning.estimate.simulation import StageWork, simulate

PASS_S = 0.05
"""Seconds of one pass (forward, gradients of inputs, gradients of weights) of one stage for one micro-batch."""
WIDTH, NUM_TOKENS, NUM_LINEARS = 512, 256, 4
SHAPES = {"sleeping": (1, 8), "multiplying": (NUM_TOKENS, WIDTH)}
"""Kind of layers -> shape of what travels between stages."""
NUM_MESSAGES = 20
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1}
"""Schedule -> chunks of a stage."""
GOAL_STEP, GOAL_INPUTS = 0.05, 0.65


@dataclass(frozen=True)
class Case:
    """One schedule, on so many ranks, with layers of one kind."""

    schedule: str
    num_stages: int
    num_micro_batches: int
    kind: str

    @property
    def chunks(self) -> int:
        """Chunks of a stage."""
        return SCHEDULES[self.schedule]

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.schedule}, {self.num_stages} stages, {self.num_micro_batches} micro-batches, {self.kind}"


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class Sleeping(nn.Module):
    """A layer whose three passes take `seconds` each."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(SHAPES["sleeping"][1], SHAPES["sleeping"][1], bias=False)
        self.seconds = seconds
        self.wait_for_weights()

    def wait_for_weights(self) -> None:
        """Let the gradient of the weight take its time; copies of a module come without hooks of their weights."""
        self.linear.weight.register_post_accumulate_grad_hook(lambda _: time.sleep(self.seconds))

    def forward(self, x: Tensor) -> Tensor:
        rows, width = SHAPES["sleeping"]
        return _Sleep.apply(self.linear(x[:rows, :width]), self.seconds)  # type: ignore[no-any-return, no-untyped-call]


def build_multiplying(num_linears: int) -> nn.Module:
    """Build a layer of matmuls."""
    linears = (nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(num_linears))
    return nn.Sequential(*linears)


class Layers(nn.Module):
    """Layers in a row, behind the place where a stage's input comes in."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.entry: nn.Module = TakenOut()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.layers:
            x = layer(x)
        return x


def keep_stage(model: nn.Module, stage: PipelineStage) -> Received | None:
    """Take out of `Layers` what `stage` does not hold."""
    assert isinstance(model, Layers)
    for index in range(stage.num_layers):
        if not stage.holds(index):
            model.layers[index] = TakenOut()
    if stage.is_first:
        return None
    received = Received()
    model.entry = received
    return received


class Mean:
    """Learns rows of numbers."""

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return what the model makes of them."""
        outputs: Tensor = model(batch)
        return outputs

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        """Return their sum."""
        return outputs.sum()

    def count_units(self, batch: Tensor) -> int:
        """Count them."""
        return len(batch)


def build_layers(case: Case) -> Layers:
    """Build one layer for each chunk, which all have as much to do."""
    count = case.num_stages * case.chunks
    if case.kind == "sleeping":
        return Layers([Sleeping(PASS_S / case.chunks) for _ in range(count)])
    return Layers([build_multiplying(NUM_LINEARS // case.chunks) for _ in range(count)])


def play(cases: list[Case], num_rounds: int) -> tuple[dict[str, float], list[list[float]]]:
    """Return the seconds of a message by kind of case, and of each case's steps; every rank calls it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        steps = [build_step(case) for case in cases]
        rounds = [[time_on_slowest(step) for step in steps] for _ in range(num_rounds + 1)]
        messages = {kind: time_message(shape) for kind, shape in SHAPES.items()}
        return messages, [list(seconds) for seconds in zip(*rounds[1:], strict=True)]
    finally:
        dist.destroy_process_group()


def build_step(case: Case) -> Callable[[], object]:
    """Build the model of one case, and return what runs a step of it."""
    plan = Plan(pp=case.num_stages, schedule=case.schedule, virtual_stages=case.chunks)  # type: ignore[arg-type]
    count = case.num_stages * case.chunks
    rows = ModelRows(ModelParts("Layers", num_layers=count), keep_stage=keep_stage)
    parallel = cut(build_layers(case), rows, plan, build_mesh(plan))
    for chunk in parallel.chunks[:-1]:  # copies
        for layer in chunk.module.modules():
            if isinstance(layer, Sleeping):
                layer.wait_for_weights()
    # As activations behind an embedding: a linear layer on inputs without gradients has nothing to split.
    batches = [torch.randn(NUM_TOKENS, WIDTH, requires_grad=True) for _ in range(case.num_micro_batches)]
    return lambda: parallel.accumulate_gradients(Mean(), batches)


def time_message(shape: tuple[int, ...]) -> float:
    """Return the seconds of an activation behind its header, from the first rank to the second."""
    parts = (torch.zeros(10, dtype=torch.int64), torch.zeros(shape))
    seconds = []
    for _ in range(NUM_MESSAGES):
        dist.barrier()
        began_s = time.perf_counter()
        for sender in (0, 1):
            for part in parts:
                if dist.get_rank() == sender:
                    dist.send(part, 1 - sender)
                elif dist.get_rank() == 1 - sender:
                    dist.recv(part, sender)
        seconds.append((time.perf_counter() - began_s) / 2)
    return statistics.median(seconds)


def time_on_slowest(step: Callable[[], object]) -> float:
    """Return the seconds of the slowest rank."""
    dist.barrier()
    began_s = time.perf_counter()
    step()
    seconds = torch.tensor(time.perf_counter() - began_s, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def time_passes(num_rounds: int) -> dict[str, float]:
    """Return the seconds of each pass of one stage of matmuls, timed alone and by turns."""
    torch.set_num_threads(1)
    whole = build_multiplying(NUM_LINEARS)
    split = copy.deepcopy(whole)
    gradients = split_backward_(split)
    x = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    seconds: dict[str, list[float]] = {"forward": [], "whole": [], "inputs": [], "weights": []}

    def clock(name: str, run: Callable[[], Any]) -> Any:
        began_s = time.perf_counter()
        result = run()
        seconds[name].append(time.perf_counter() - began_s)
        return result

    for _ in range(num_rounds):
        loss = clock("forward", lambda: whole(x)).sum()
        clock("whole", loss.backward)
        with gradients.deferring():
            clock("inputs", split(x).sum().backward)
        deferred = gradients.take()
        clock("weights", lambda deferred=deferred: accumulate_(deferred))
    return {name: min(found) for name, found in seconds.items()}


def get_work(case: Case, passes: dict[str, float]) -> StageWork:
    """Return what the simulation is told of a chunk of a stage."""
    if case.kind == "sleeping":
        return StageWork(PASS_S / case.chunks, 2 * PASS_S / case.chunks, PASS_S / case.chunks)
    is_split = case.schedule == "zero_bubble"
    backward = passes["inputs"] + passes["weights"] if is_split else passes["whole"]
    return StageWork(passes["forward"] / case.chunks, backward / case.chunks, passes["weights"] / case.chunks)


def find_published_bubble(case: Case) -> float:
    """Return the share of waiting where all three passes take as long (Narayanan et al. 2021; Qi et al. 2023)."""
    idle = case.num_stages - 1
    busy = case.num_micro_batches * {"interleaved": case.chunks, "zero_bubble": 3}.get(case.schedule, 1)
    return idle / (busy + idle)


def compare(case: Case, seconds: list[float], passes: dict[str, float], message_s: float) -> tuple[Row, Bar]:
    """Hold the measured steps of one case against the simulation."""
    work = get_work(case, passes)
    timeline = simulate(
        case.schedule, [work] * case.num_stages, case.num_micro_batches, virtual_stages=case.chunks, message_s=message_s
    )
    fastest_s = min(seconds)
    busy_s = case.num_micro_batches * case.chunks * (work.forward_s + work.backward_s)
    note = (
        f"simulated {timeline.step_time_s:.4g} s, {message_s * 1e3:.2g} ms each message; "
        f"waits {1 - busy_s / fastest_s:.1%} of the fastest, simulated {timeline.bubble_fraction:.1%}"
    )
    if case.kind == "sleeping":
        note += f", formula {find_published_bubble(case):.1%}"
    bar = Bar(f"step over simulated, {case.name}", fastest_s / timeline.step_time_s, 1 + GOAL_STEP, at_least=False)
    return Row(case.name, statistics.median(seconds), fastest_s, max(seconds), note), bar


def main() -> None:
    """Play all cases and report."""
    arguments = parse_arguments(__doc__ or "")
    num_rounds = 2 if arguments.quick else 5
    passes = time_passes(10 if arguments.quick else 50)
    rows, bars = [], []
    for num_stages, kinds in ((2, ("sleeping", "multiplying")), (4, ("sleeping",))):
        cases = [Case(schedule, num_stages, 2 * num_stages, kind) for kind in kinds for schedule in SCHEDULES]
        messages, steps = launch(num_stages, play, cases, num_rounds)
        for case, seconds in zip(cases, steps, strict=True):
            row, bar = compare(case, seconds, passes, messages[case.kind])
            rows.append(row)
            bars += [bar] if case.kind == "sleeping" else []
    rows += [
        Row(f"one stage of matmuls: {name}", fastest_s, fastest_s, fastest_s, "") for name, fastest_s in passes.items()
    ]
    share = passes["inputs"] / passes["whole"]
    bars.append(Bar("gradients of inputs over the whole backward pass", share, GOAL_INPUTS, at_least=False))
    report("pipeline_bubble", "s", rows, bars, arguments)


if __name__ == "__main__":
    main()
