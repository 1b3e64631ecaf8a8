"""How many layers each stage of a pipeline holds, by what layers cost: estimated, or measured.

    costs of layers, embedding and head included -> stages whose costliest one costs least

A cost is that of one layer for one micro-batch, in any unit; the first layer's includes what comes before it, the last
one's what comes after it. `models/<name>/plan.py` estimates them from multiply-adds; `measure_layers` runs the model.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.pipeline import Learner, PipelineStage

_NUM_ROUNDS = 5


def split_layers(costs: Sequence[float], num_stages: int) -> list[PipelineStage]:
    """Split layers over stages so that the costliest stage costs least, and then so that they are most alike.

    Exact, by dynamic programming. Raises `ConfigError` for more stages than layers.

    >>> [(stage.first, stage.stop) for stage in split_layers([1, 1, 1, 1, 1, 3], 3)]
    [(0, 3), (3, 5), (5, 6)]
    """
    num_layers = len(costs)
    if num_stages > num_layers:
        raise ConfigError(
            f"pp*virtual_stages = {num_stages} is more than layers={num_layers}; use at most {num_layers}"
        )
    least, _ = _cut(costs, num_stages, max)
    limit = least * (1 + 1e-9)  # sums in another order
    _, bounds = _cut(costs, num_stages, lambda before, cost: before + cost**2 if cost <= limit else float("inf"))
    return [
        PipelineStage(index, num_stages, first, stop, num_layers)
        for index, (first, stop) in enumerate(itertools.pairwise(bounds))
    ]


def _cut(costs: Sequence[float], num_stages: int, join: Callable[[float, float], float]) -> tuple[float, list[int]]:
    """Cut `costs` into parts of at least one, for the least value of `join(value of the parts before, cost)`.

    Returns the value and the bounds of the parts; of equally good ones those with more layers in front.
    """
    sums = [0.0, *itertools.accumulate(map(float, costs))]
    infinity = float("inf")
    values = [0.0] + [infinity] * len(costs)
    choices = []
    for _ in range(num_stages):
        found = [
            min(
                ((join(values[start], sums[stop] - sums[start]), -start) for start in range(stop)),
                default=(infinity, 0),
            )
            for stop in range(len(sums))
        ]
        values = [value for value, _ in found]
        choices.append([-start for _, start in found])
    bounds = [len(costs)]
    for starts in reversed(choices):
        bounds.append(starts[bounds[-1]])
    return values[-1], bounds[::-1]


def measure_layers(model: nn.Module, layers: Sequence[nn.Module], learner: Learner, batch: Any) -> list[float]:
    """Measure the seconds that each of `layers` takes for one batch, forward and backward, in the order they run in.

    The first one's include what comes before it, the last one's what comes after it and the loss. The gradients that
    it leaves are deleted. Raises `ConfigError` where a layer does not run, or runs more than once.
    """
    rounds = [_time_layers(model, layers, learner, batch) for _ in range(_NUM_ROUNDS + 1)]
    model.zero_grad(set_to_none=True)
    return [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]  # the first one warms up


def _time_layers(model: nn.Module, layers: Sequence[nn.Module], learner: Learner, batch: Any) -> list[float]:
    """Note the time whenever a layer is done, and whenever the gradient of its output is there."""
    forward_s: list[float] = []
    backward_s: list[float] = []

    def note(times: list[float]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    def leave(_: nn.Module, inputs: Any, output: Tensor) -> None:
        note(forward_s)
        output.register_hook(lambda _: note(backward_s))

    handles = [layer.register_forward_hook(leave) for layer in layers]
    try:
        note(forward_s)
        loss = learner.loss(learner.forward(model, batch), batch)
        note(forward_s)
        note(backward_s)
        loss.backward()
        note(backward_s)
    finally:
        for handle in handles:
            handle.remove()
    if not len(forward_s) == len(backward_s) == len(layers) + 2:
        raise ConfigError(
            f"{len(forward_s) - 2} of {len(layers)} layers ran forward and {len(backward_s) - 2} backward in one pass; "
            "name the layers that a pass of the model runs once each"
        )
    return _join_ends(forward_s, backward_s)


def _join_ends(forward_s: Sequence[float], backward_s: Sequence[float]) -> list[float]:
    """Return seconds by layer out of the times between them; ends belong to the first and the last layer.

    >>> _join_ends([0.0, 3.0, 4.0, 9.0], [9.0, 10.0, 12.0, 15.0])
    [6.0, 9.0]
    """
    forward = [end - begin for begin, end in itertools.pairwise(forward_s)]
    backward = [end - begin for begin, end in itertools.pairwise(backward_s)][::-1]
    costs = [sum(pair) for pair in zip(forward, backward, strict=True)]
    return [*costs[:-2], costs[-2] + costs[-1]]
