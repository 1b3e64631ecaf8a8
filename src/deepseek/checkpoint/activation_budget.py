"""A memory budget for activations: which blocks of a model to recompute, measured and chosen.

    plan = checkpoint_within_budget_(model, (batch,), memory_budget=0.5)
    print(plan)

`plan_checkpoints` runs one batch through a model and measures each repeated block: its time, and the bytes that
autograd saves in it, seen by `saved_tensors_hooks`. `segments.py` chooses the blocks whose recomputation costs least
time among those that keep the budget, and `activations.checkpoint` does the rest, so that gradients, random numbers and
buffers are those of the plain model. `train` does this where `ds_activation_checkpoint` is a number.

A budget is a share of what is kept without recomputation: 1.0 keeps everything, 0.5 half. For code that `ds.jit`
compiles, torch's partitioner cuts by operator instead: see `compiler/passes/memory/recomputation.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.checkpoint.activations import checkpoint, find_blocks
from deepseek.checkpoint.recomputed_state import RecomputedState
from deepseek.checkpoint.segments import Choice, Segment, choose
from deepseek.compiler.passes.memory.peak_tracking import tensors_in
from deepseek.compiler.passes.memory.recomputation import check_budget
from deepseek.core.errors import ConfigError


@dataclass(frozen=True)
class CheckpointPlan:
    """Blocks to run again, and what was measured to choose them."""

    choice: Choice
    segments: tuple[Segment, ...]
    kept_before_bytes: int
    """Bytes that autograd keeps at once without the plan."""

    def __str__(self) -> str:
        names = ", ".join(self.choice.recomputed) or "nothing"
        return (
            f"{self.kept_before_bytes:,} bytes kept become {self.choice.peak_bytes:,} at "
            f"{self.choice.extra_time_s * 1e3:.1f} ms a step; run again: {names}"
        )


def plan_checkpoints(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    memory_budget: float,
    blocks: Sequence[str] | None = None,
) -> CheckpointPlan:
    """Measure `model` on one batch and choose what to run again.

    `memory_budget` is a share in (0, 1] of what autograd keeps; `blocks` are paths of modules that run one after the
    other, the repeated blocks of the model by default. The model's buffers and the generators are as they were
    afterwards. Raises `ConfigError` for a budget that no choice meets, and for a model in evaluation mode.
    """
    check_budget(memory_budget)
    if not model.training:
        raise ConfigError("the model is in evaluation mode and keeps other values than in training; call model.train()")
    names = list(blocks) if blocks is not None else find_blocks(model)
    measured = _measure(model, tuple(example_inputs), names)
    whole = choose(measured.segments, 2**62, outside_bytes=measured.outside_bytes).peak_bytes
    choice = choose(measured.segments, math.floor(whole * memory_budget), outside_bytes=measured.outside_bytes)
    return CheckpointPlan(choice, tuple(measured.segments), whole)


def checkpoint_within_budget_(
    model: nn.Module, example_inputs: Sequence[Any], *, memory_budget: float, blocks: Sequence[str] | None = None
) -> CheckpointPlan:
    """Plan as `plan_checkpoints` does, and checkpoint the chosen blocks of `model` in place.

    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(4)))
    >>> plan = checkpoint_within_budget_(model, (torch.ones(2, 8),), memory_budget=0.8)
    >>> len(plan.choice.recomputed)
    1
    >>> model(torch.ones(2, 8)).sum().backward()
    """
    plan = plan_checkpoints(model, example_inputs, memory_budget=memory_budget, blocks=blocks)
    for name in plan.choice.recomputed:
        checkpoint(model.get_submodule(name))
    return plan


@dataclass
class _Measured:
    segments: list[Segment] = field(default_factory=list)
    outside_bytes: int = 0


class _SavedTensors:
    """Tensors that autograd saves, by the segment that was running."""

    def __init__(self, owned: set[int]) -> None:
        self.owned = owned
        self.current = ""
        self.began_s = 0.0
        self.times_s: dict[str, float] = {}
        self.inputs: dict[str, dict[int, int]] = {}
        self.saved: dict[str, dict[int, int]] = {}
        self.alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        key = _key_of(tensor)
        if key not in self.owned:
            self.saved.setdefault(self.current, {})[key] = tensor.untyped_storage().nbytes()
            self.alive.append(tensor)
        return tensor

    def enter(self, name: str, inputs: Any) -> None:
        if self.current:
            raise ConfigError(f"block {name} runs inside block {self.current}; name blocks beside each other")
        if name in self.times_s:
            raise ConfigError(f"block {name} runs more than once in a forward pass and cannot be run again as one")
        tensors = tensors_in(inputs)
        self.alive += tensors
        self.inputs[name] = {_key_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.current, self.began_s = name, time.perf_counter()

    def leave(self, name: str, output: Any) -> None:
        self.times_s[name] = time.perf_counter() - self.began_s
        self.alive += tensors_in(output)
        self.current = ""

    def summarize(self, names: Sequence[str]) -> _Measured:
        """Sum the bytes by segment; a storage that several keep counts for the first that cannot do without it."""
        measured, counted = _Measured(), set(self.owned)
        all_inputs = {key for name in names for key in self.inputs[name]}
        for name in names:
            fresh = {key: size for key, size in self.inputs[name].items() if key not in counted}
            counted |= set(fresh)
            inside = {
                key: size
                for key, size in self.saved.get(name, {}).items()
                if key not in counted and key not in all_inputs
            }
            counted |= set(inside)
            segment = Segment(name, self.times_s[name], sum(fresh.values()), sum(inside.values()))
            measured.segments.append(segment)
        outside = self.saved.get("", {}).items()
        measured.outside_bytes = sum(size for key, size in outside if key not in counted)
        return measured


def _measure(model: nn.Module, inputs: tuple[Any, ...], names: Sequence[str]) -> _Measured:
    """Run the forward pass twice, the first time to warm up, and look at the second."""
    _watch(model, inputs, names)
    saved = _watch(model, inputs, names)
    missing = [name for name in names if name not in saved.times_s]
    if missing:
        raise ConfigError(f"block {missing[0]} does not run in the forward pass; name blocks that do")
    return saved.summarize(list(saved.times_s))


def _watch(model: nn.Module, inputs: tuple[Any, ...], names: Sequence[str]) -> _SavedTensors:
    """Look at one forward pass, which leaves the model and the generators as they were."""
    with RecomputedState(model, inputs, {}), torch.random.fork_rng():
        saved = _SavedTensors({_key_of(tensor) for tensor in [*model.parameters(), *model.buffers()]})
        with _watching(model, names, saved):
            model(*inputs)
    return saved


@contextmanager
def _watching(model: nn.Module, names: Sequence[str], saved: _SavedTensors) -> Iterator[None]:
    handles = []
    for name in names:
        module = model.get_submodule(name)
        enter = module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: saved.enter(name, [*args, *kwargs.values()]), with_kwargs=True
        )
        leave = module.register_forward_hook(lambda _, args, output, name=name: saved.leave(name, output))
        handles += [enter, leave]
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _key_of(tensor: Tensor) -> int:
    """Return what identifies a piece of memory."""
    key: int = tensor.untyped_storage()._cdata
    return key
