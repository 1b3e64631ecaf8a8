"""A memory budget for training: what the backward pass needs again is kept or computed a second time, by cost.

Code run operator by operator: `plan_recomputation` measures each repeated block of a model (its time, and the bytes
that autograd saves in it, seen by `saved_tensors_hooks`), `segments.py` chooses which blocks to run again, and
`recompute_` does so with `torch.utils.checkpoint`. Gradients are bit for bit those of the plain model, dropout
included: the generator's state is put back for the second run, and the second run leaves buffers, such as the running
statistics of batch normalization, as the first one set them.

Code that is captured: `inductor_with_budget` and `eager_with_budget` give the budget to torch's partitioner, which cuts
the joint graph of forward and backward where the fewest bytes cross (min-cut) and recomputes by operator, not by block.

A budget is a share of what is kept without recomputation: 1.0 keeps everything, 0.5 half.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config
from torch.utils.checkpoint import checkpoint

from deepseek.compiler.passes.memory.peak_tracking import tensors_in
from deepseek.compiler.passes.memory.segments import Choice, Segment, choose
from deepseek.core.errors import ConfigError

Backend = Callable[[fx.GraphModule, list[Tensor]], Any]


@dataclass(frozen=True)
class RecomputationPlan:
    """Blocks to run again, and what was measured to choose them."""

    choice: Choice
    segments: tuple[Segment, ...]
    kept_before_bytes: int
    """What autograd keeps at once without the plan."""

    def __str__(self) -> str:
        names = ", ".join(self.choice.recomputed) or "nothing"
        return (
            f"{self.kept_before_bytes:,} bytes kept become {self.choice.peak_bytes:,} at "
            f"{self.choice.extra_time_s * 1e3:.1f} ms a step; run again: {names}"
        )


class Recomputation:
    """The blocks of a model that run again, until `remove`."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)

    def remove(self) -> None:
        """Let the blocks keep what they compute again."""
        for module in self.modules:
            del module.forward


def plan_recomputation(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    memory_budget: float,
    segments: Sequence[str] | None = None,
) -> RecomputationPlan:
    """Measure `model` on one batch and choose what to run again.

    `memory_budget` is a share in (0, 1] of what autograd keeps; `segments` are paths of modules that run one after the
    other, the repeated blocks of the model by default. The model's buffers and the generators are as they were
    afterwards. Raises `ConfigError` for a budget that no choice meets, and for a model in evaluation mode.
    """
    check_budget(memory_budget)
    if not model.training:
        raise ConfigError("the model is in evaluation mode and keeps other values than in training; call model.train()")
    names = list(segments) if segments is not None else find_segments(model)
    measured = _measure(model, example_inputs, names)
    whole = choose(measured.segments, 2**62, outside_bytes=measured.outside_bytes).peak_bytes
    choice = choose(measured.segments, math.floor(whole * memory_budget), outside_bytes=measured.outside_bytes)
    return RecomputationPlan(choice, tuple(measured.segments), whole)


def recompute_(model: nn.Module, plan: RecomputationPlan) -> Recomputation:
    """Run the blocks that `plan` names again in backward passes; in place, until `remove` of the result.

    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(4)))
    >>> plan = plan_recomputation(model, (torch.ones(2, 8),), memory_budget=0.8)
    >>> len(plan.choice.recomputed)
    1
    >>> recomputation = recompute_(model, plan)
    >>> model(torch.ones(2, 8)).sum().backward()
    >>> recomputation.remove()
    """
    modules = [model.get_submodule(name) for name in plan.choice.recomputed]
    already = [name for name, module in zip(plan.choice.recomputed, modules, strict=True) if "forward" in vars(module)]
    if already:
        raise ConfigError(f"{already[0]} runs again already, or its forward was replaced; remove that first")
    for module in modules:
        module.forward = _recomputing(module)
    return Recomputation(modules)


def find_segments(model: nn.Module) -> list[str]:
    """Paths of the blocks that a model repeats: members of one kind, with members of their own, of a list of modules.

    >>> find_segments(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False))
    ['layers.0', 'layers.1']
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(path.startswith(f"{each}.") for each in found):
            continue
        blocks = [(name, child) for name, child in module.named_children() if any(True for _ in child.children())]
        kinds = {type(child) for _, child in blocks}
        if len(blocks) > 1 and len(kinds) == 1 and kinds != {nn.ModuleList}:
            found += [f"{path}.{name}" if path else name for name, _ in blocks]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no list of repeated blocks; name the segments, paths of modules in the order "
            "in which they run"
        )
    return found


def inductor_with_budget(memory_budget: float) -> Backend:
    """A backend for `torch.compile`: inductor, keeping for the backward pass about that share of what it would.

        step = torch.compile(model, backend=inductor_with_budget(0.5))

    Without a budget inductor already recomputes what costs next to nothing; below 1.0 it also recomputes what costs
    time, cheapest per byte first.
    """
    check_budget(memory_budget)
    from torch._inductor.compile_fx import compile_fx

    return _with_budget(compile_fx, memory_budget)


def eager_with_budget(memory_budget: float) -> Backend:
    """The same for code that is captured and then run operator by operator, where no code is to be generated."""
    check_budget(memory_budget)
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    run_as_it_is = aot_autograd(
        fw_compiler=boxed_nop,
        partition_fn=min_cut_rematerialization_partition,
    )
    return _with_budget(run_as_it_is, memory_budget)


def _with_budget(backend: Backend, memory_budget: float) -> Backend:
    def compile_graph(graph_module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        with config.patch(activation_memory_budget=memory_budget):
            return backend(graph_module, inputs)

    return compile_graph


def check_budget(memory_budget: float) -> None:
    """Raise `ConfigError` for a budget outside of (0, 1]."""
    if not 0 < memory_budget <= 1:
        raise ConfigError(
            f"memory_budget={memory_budget:g} is not a share of what is kept; choose over 0 and up to 1, such as 0.5"
        )


@dataclass
class _Measured:
    segments: list[Segment] = field(default_factory=list)
    outside_bytes: int = 0


class _Watch:
    """What autograd saves, by the segment that was running."""

    def __init__(self, owned: set[int]) -> None:
        self.owned = owned
        self.current = ""
        self.began_s = 0.0
        self.times_s: dict[str, float] = {}
        self.inputs: dict[str, dict[int, int]] = {}
        self.saved: dict[str, dict[int, int]] = {}
        self.alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.owned:
            self.saved.setdefault(self.current, {})[key] = tensor.untyped_storage().nbytes()
            self.alive.append(tensor)
        return tensor

    def enter(self, name: str, inputs: Any) -> None:
        if self.current:
            raise ConfigError(f"segment {name} runs inside segment {self.current}; name segments beside each other")
        if name in self.times_s:
            raise ConfigError(f"segment {name} runs more than once in a forward pass and cannot be run again as one")
        tensors = tensors_in(inputs)
        self.alive += tensors
        self.inputs[name] = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
        self.current, self.began_s = name, time.perf_counter()

    def leave(self, name: str, output: Any) -> None:
        self.times_s[name] = time.perf_counter() - self.began_s
        self.alive += tensors_in(output)
        self.current = ""

    def summarize(self, names: Sequence[str]) -> _Measured:
        """Bytes by segment; a storage that several keep counts for the first that cannot do without it."""
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


def _measure(model: nn.Module, inputs: Sequence[Any], names: Sequence[str]) -> _Measured:
    """Run the forward pass twice, the first time to warm up, and look at the second."""
    watch = _Watch({})  # type: ignore[arg-type]
    for _ in range(2):
        watch = _Watch({each.untyped_storage()._cdata for each in [*model.parameters(), *model.buffers()]})
        with _leaving_no_trace(model), _watching(model, names, watch):
            output = model(*inputs)
        del output
    order = [name for name in watch.times_s if name in names]
    missing = [name for name in names if name not in watch.times_s]
    if missing:
        raise ConfigError(f"segment {missing[0]} does not run in the forward pass; name segments that do")
    return watch.summarize(order)


@contextmanager
def _watching(model: nn.Module, names: Sequence[str], watch: _Watch) -> Iterator[None]:
    handles = []
    for name in names:
        module = model.get_submodule(name)
        enter = module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: watch.enter(name, [*args, *kwargs.values()]), with_kwargs=True
        )
        leave = module.register_forward_hook(lambda _, args, output, name=name: watch.leave(name, output))
        handles += [enter, leave]
    try:
        with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Put generators and buffers back."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.data.copy_(kept[name])


def _recomputing(module: nn.Module) -> Callable[..., Any]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not module.training:
            return original(*args, **kwargs)
        return checkpoint(original, *args, use_reentrant=False, context_fn=lambda: _contexts(module), **kwargs)

    return forward


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _on_copies_of_buffers(module)


@contextmanager
def _on_copies_of_buffers(module: nn.Module) -> Iterator[None]:
    """Let the second run write into copies, so that running statistics move once per step."""
    places = [(each, name) for each in module.modules() for name, value in each._buffers.items() if value is not None]
    kept = [each._buffers[name] for each, name in places]
    for (each, name), value in zip(places, kept, strict=True):
        assert value is not None
        each._buffers[name] = value.clone()
    try:
        yield
    finally:
        for (each, name), value in zip(places, kept, strict=True):
            each._buffers[name] = value
