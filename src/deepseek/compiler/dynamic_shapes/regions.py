"""Repeated blocks, each kind compiled once, and the ledger that counts every compilation.

A deep model is mostly one block many times. `find_repeated` names the groups of such blocks, by structure and not by
class alone; `Region` is the compiled form that all members of a group share. It compiles the *function* of the block,
with the block as an argument, so that parameters are inputs of the graph and one graph serves all members. Everything
between the blocks runs as it is. Measured on a 12-layer encoder, one training step: 25 s to compile it whole, 6 s as
one block, and the same speed after.

A region runs in one of three ways, which `dynamic_graph` sets in the `Situation` they share: plain, symbolic (every dim
that has varied is a symbol in the compiled code), or for one boundary (the length is a constant, the rest as before).
Which dims vary is learned here, from the shapes that reach the block itself.

Each compilation passes through a `CountingBackend`, so that the bound on them is a fact and not a hope: beyond it a
graph runs operator by operator.
"""

from __future__ import annotations

import contextlib
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepseek.compiler.dynamic_shapes.buckets import Way
from deepseek.compiler.dynamic_shapes.padding import ShapeHistory, Shapes, shapes_of

Backend = Callable[..., Callable[..., Any]]
# What stands for no upper bound where a lower one is given.
_LONGEST = 2**40


class DynamicGraphWarning(UserWarning):
    """A graph runs another way than was hoped for; the answer is the same."""


@dataclass(frozen=True)
class Compilation:
    """One graph that was compiled, and why."""

    target: str
    way: Way
    shapes: tuple[tuple[int | str, ...], ...]
    seconds: float
    was_cached: bool

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) for shape in self.shapes[:3])
        origin = "from disk" if self.was_cached else "compiled"
        return f"{self.target}, {self.way}: {origin} in {self.seconds:.2f} s for {shapes}"


@dataclass
class Ledger:
    """How many graphs may be compiled, which were, and how many were refused since the bound was reached."""

    max_compilations: int
    compilations: list[Compilation] = field(default_factory=list)
    num_refused: int = 0

    @property
    def num_left(self) -> int:
        return self.max_compilations - len(self.compilations)


class Situation(threading.local):
    """The way in which the regions of one model run at this moment, in this thread."""

    def __init__(self) -> None:
        self.way: Way | None = None
        self.is_learning = False
        self.is_busy = False

    @contextlib.contextmanager
    def set(self, way: Way | None, *, is_learning: bool) -> Iterator[None]:
        """Run the regions this `way` (plain for `None`) inside the block, taking note of shapes or not."""
        before = self.way, self.is_learning, self.is_busy
        self.way, self.is_learning, self.is_busy = way, is_learning, True
        try:
            yield
        finally:
            self.way, self.is_learning, self.is_busy = before


class CountingBackend:
    """A backend of torch.compile that enters each graph into a ledger, and compiles no more than it allows."""

    def __init__(self, backend: Backend, ledger: Ledger, target: str, way: Way) -> None:
        self.backend, self.ledger, self.target, self.way = backend, ledger, target, way

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.ledger.num_left <= 0:
            self.ledger.num_refused += 1
            return graph.forward
        hits, began_s = _count_cache_hits(), time.perf_counter()
        compiled = self.backend(graph, inputs)
        shapes = tuple(tuple(_size(size) for size in leaf.shape) for leaf in inputs if isinstance(leaf, Tensor))
        self.ledger.compilations.append(
            Compilation(self.target, self.way, shapes, time.perf_counter() - began_s, _count_cache_hits() > hits)
        )
        return compiled


class Region:
    """One function compiled for all that share it: the members of a group of blocks, or a whole model alone."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        target: str,
        backend: Backend,
        ledger: Ledger,
        situation: Situation,
        bounds: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.function, self.target, self.backend = function, target, backend
        self.ledger, self.situation, self.bounds = ledger, situation, bounds
        self._histories: dict[Any, ShapeHistory] = {}
        self._is_strict = True
        self._compiled: dict[Way, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        way = self.situation.way
        if way is None:
            if self.situation.is_learning:
                self.learn(args, kwargs)
            return self.function(*args, **kwargs)
        if self.situation.is_learning:
            self.learn(args, kwargs)
        return self._run_marked(way, args, kwargs)

    def learn(self, args: Any, kwargs: Any) -> None:
        """Take note of the shapes of a call."""
        shapes = shapes_of(_leaves(args, kwargs))
        self._histories.setdefault(_kind_of_call(shapes, kwargs), ShapeHistory()).note(shapes)

    @property
    def has_varied(self) -> bool:
        return any(dim for history in self._histories.values() for dim in history.varying)

    def _run_marked(self, way: Way, args: Any, kwargs: Any) -> Any:
        """A call whose varying dims are marked, should it compile; marks that the function contradicts are softened."""
        from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

        self._mark(way, args, kwargs)
        try:
            return self._compiled_for(way)(*args, **kwargs)
        except (torch._dynamo.exc.UserError, ConstraintViolationError) as error:
            if not self._is_strict or not _is_about_marks(error):
                raise
            warnings.warn(
                f"{self.target} fixes a dim that varies, and is compiled for each of its sizes: {_find_reason(error)}",
                DynamicGraphWarning,
                stacklevel=2,
            )
            self._is_strict = False
        args, kwargs = _without_marks((args, kwargs))
        self._mark(way, args, kwargs)
        return self._compiled_for(way)(*args, **kwargs)

    def _mark(self, way: Way, args: Any, kwargs: Any) -> None:
        leaves = _leaves(args, kwargs)
        history = self._histories.get(_kind_of_call(shapes_of(leaves), kwargs))
        if history is None:
            return
        for leaf, dims in zip(leaves, history.varying, strict=True):
            for dim in dims:
                if leaf.shape[dim] > 1 and leaf.shape[dim] != way:
                    self._mark_dim(leaf, dim)

    def _mark_dim(self, leaf: Tensor, dim: int) -> None:
        low, high = self.bounds
        low, high = max(2, low or 2), high or _LONGEST
        if not self._is_strict:
            torch._dynamo.maybe_mark_dynamic(leaf, dim)
        elif self.bounds != (None, None) and low <= leaf.shape[dim] <= high:
            torch._dynamo.mark_dynamic(leaf, dim, min=low, max=high)
        else:
            torch._dynamo.mark_dynamic(leaf, dim)

    def _compiled_for(self, way: Way) -> Callable[..., Any]:
        if way not in self._compiled:
            backend = CountingBackend(self.backend, self.ledger, self.target, way)
            self._compiled[way] = torch.compile(self.function, dynamic=False, backend=backend)
        return self._compiled[way]


class SharedForward:
    """A `forward` that replaces a block's own while the block runs as a member of a region."""

    def __init__(self, region: Region, block: nn.Module) -> None:
        self.region, self.block = region, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.region(self.block, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the block is a plain block: what copies the model shares its regions anew."""
        return _bind, (type(self.block).forward, self.block)


def find_repeated(model: nn.Module) -> list[list[nn.Module]]:
    """Groups of two or more sibling blocks with one structure, outermost first, in the order of the model.

    Blocks are of one structure when class, settings, and names, shapes and types of all parameters and buffers agree,
    at every depth. Single layers are no blocks: there is nothing to win in compiling one matmul.

    >>> stack = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)), nn.Linear(8, 2))
    >>> [len(group) for group in find_repeated(stack)]
    [3]
    """
    kinds: dict[Any, list[nn.Module]] = {}
    for child in model.children():
        if any(True for _ in child.children()) and "forward" in dir(type(child)) and not _is_container(child):
            kinds.setdefault(structure_of(child), []).append(child)
    groups = [list(dict.fromkeys(kind)) for kind in kinds.values()]
    repeated = [group for group in groups if len(group) > 1]
    taken = {id(block) for group in repeated for block in group}
    for child in model.children():
        if id(child) not in taken:
            repeated += find_repeated(child)
    return repeated


def structure_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the structure that two blocks must share to run the same compiled code."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    described = tuple(
        (name, tuple(tensor.shape), tensor.dtype, str(tensor.device), tensor.requires_grad) for name, tensor in tensors
    )
    settings = tuple(
        (
            name,
            type(submodule),
            tuple(sorted((key, value) for key, value in vars(submodule).items() if _is_setting(key, value))),
        )
        for name, submodule in module.named_modules()
    )
    return type(module), described, settings


def share(group: Sequence[nn.Module], region: Region) -> None:
    """Let every block of a group run through one region."""
    for block in group:
        block.forward = SharedForward(region, block)


def _bind(function: Callable[..., Any], block: nn.Module) -> types.MethodType:
    return types.MethodType(function, block)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Return all tensors of a call, and what else it was given; without a walk where nothing is nested."""
    if kwargs or any(isinstance(argument, list | tuple | dict) for argument in args):
        return pytree.tree_leaves((args, kwargs))
    return args


def _kind_of_call(shapes: Shapes, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells apart calls that share no history: which arguments are named, which leaves are tensors."""
    return tuple(kwargs), tuple(None if shape is None else len(shape) for shape in shapes)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _is_setting(key: str, value: Any) -> bool:
    return not key.startswith("_") and isinstance(value, bool | int | float | str)


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _count_cache_hits() -> int:
    counters = torch._dynamo.utils.counters
    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]


def _is_about_marks(error: Exception) -> bool:
    return "mark_dynamic" in str(error) or "Constraints violated" in str(error)


def _find_reason(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "mark_dynamic" in line or "L[" in line), lines[0] if lines else "")


def _without_marks(values: Any) -> Any:
    """Return the same tensors as new objects, which carry no marks."""
    return pytree.tree_map(lambda leaf: leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf, values)
