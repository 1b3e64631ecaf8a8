"""A function or module as `dynamic_graph` runs it: call by call, in pieces, checked against the plain function.

`DynamicGraph` takes a call apart and finds out what its dims mean (`call_arguments.py`), asks where pieces should end
(`length_policy.py`), runs each through compiled regions (`regions.py`) and puts the answers together. The first batches
of every way are compared with the plain function (`reference_runs.py`) before an answer is given; where numbers differ,
batches stay as they are from then on, with a warning that says why.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import statistics
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepseek.compiler.dynamic_shapes.buckets import SYMBOLIC, Way, group_rows
from deepseek.compiler.dynamic_shapes.call_arguments import Call, CallReader
from deepseek.compiler.dynamic_shapes.capture import compiling, describe_code, find_backend
from deepseek.compiler.dynamic_shapes.codegen import start_probing
from deepseek.compiler.dynamic_shapes.compiled_cache import CompiledStore, digest_of
from deepseek.compiler.dynamic_shapes.length_policy import CompilationState, LengthPlanner, Piece
from deepseek.compiler.dynamic_shapes.options import DynamicExplanation, DynamicOptions
from deepseek.compiler.dynamic_shapes.padding import (
    PaddingRefusedError,
    Shapes,
    compare,
    cut_length,
    find_roles,
    join_rows,
    read_lengths,
    shapes_of,
    take_rows,
)
from deepseek.compiler.dynamic_shapes.reference_runs import ReferenceRuns
from deepseek.compiler.dynamic_shapes.regions import (
    DynamicGraphWarning,
    Ledger,
    Region,
    Situation,
    find_repeated,
    share,
)

_Outputs = tuple[list[Any], Any]  # leaves, and the tree they came from

# What a compilation is taken to cost in a process that has found all of its code on disk.
_COMPILE_S = 10.0
# Of numbers that were computed in 16 bits on the way, relative to the largest.
_AUTOCAST_TOLERANCE = 5e-2


@dataclass(frozen=True)
class _Part(Piece):
    """A piece with its arguments."""

    leaves: list[Any]


@dataclass(frozen=True)
class _Batch:
    """The batch that parts belong to: its length, and for groups of rows their order and the mask."""

    length: int
    rows: Tensor | None
    mask: Tensor | None


class DynamicGraph:
    """A function, or the forward pass of a module, that is compiled for changing shapes. Made by `dynamic_graph`."""

    def __init__(self, function: Callable[..., Any], options: DynamicOptions, owner: nn.Module | None = None) -> None:
        self._function, self._options, self._owner = function, options, owner
        self._start()

    def _start(self) -> None:
        """Everything that is learned, empty."""
        options = self._options
        self._name = type(self._owner).__name__ if self._owner is not None else self._function.__qualname__
        if self._owner is None:
            functools.update_wrapper(self, self._function)
        self._reader = CallReader(self._function, options, self._name)
        self._reference = ReferenceRuns(self._plain, self._owner)
        self._lock = threading.RLock()
        self._situation = Situation()
        self._ledger = Ledger(options.max_compilations)
        self._regions: list[Region] = []
        self._blocks: tuple[str, ...] = ()
        self._whole: Callable[..., Any] | None = None
        self._store: CompiledStore | None = None
        self._num_loaded, self._num_kept = 0, 0
        self._known: set[Any] = set()
        self._planner = LengthPlanner(options.strategy, boundaries=options.boundaries, cost=options.cost)
        self._refusal: str | None = None
        self._has_warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._situation.is_busy:
            return self._function(*args, **kwargs)
        with self._lock:
            self._prepare()
            self._keep_compiled()
        call = self._reader.read(args, kwargs)
        self._planner.counts.calls += 1
        try:
            return self._run(call)
        finally:
            self._warn_of_bound()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that a copy needs; what was compiled and learned is learned again."""
        return {"_function": self._function, "_options": self._options, "_owner": self._owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def explain(self) -> DynamicExplanation:
        """Return which graphs were compiled for which shapes, and why; what is padding; what came from disk."""
        planner, counts = self._planner, self._planner.counts
        return DynamicExplanation(
            target=self._name,
            strategy="bucketed" if planner.boundaries and self._refusal is None else "symbolic",
            reason=self._refusal or planner.reason,
            blocks=self._blocks,
            boundaries=planner.boundaries,
            compilations=tuple(self._ledger.compilations),
            max_compilations=self._options.max_compilations,
            num_calls=counts.calls,
            num_pieces=counts.pieces,
            padding_share=1 - counts.real / counts.run if counts.run else 0.0,
            padding_share_before=1 - counts.real / counts.arrived if counts.arrived else 0.0,
            num_cache_hits=sum(compilation.was_cached for compilation in self._ledger.compilations),
            num_loaded=self._num_loaded,
        )

    # Setting up

    def _prepare(self) -> None:
        """Find what is compiled: the kinds of repeated blocks, or everything as one."""
        if self._whole is not None:
            return
        if self._options.backend == "inductor":
            start_probing()
        groups = find_repeated(self._owner) if self._owner is not None else []
        for group in groups:
            kind = type(group[0])
            region = self._make_region(kind.forward, kind.__name__)
            share(group, region)
            self._blocks += (f"{kind.__name__}, {len(group)} times",)
        self._whole = self._function if groups else self._make_region(self._function, self._name)
        if self._options.cache:
            self._store = CompiledStore(digest_of(self._name, *describe_code(self._function, self._owner)))
            self._num_loaded = self._store.load()
            atexit.register(_keep_at_exit, weakref.ref(self))

    def _make_region(self, function: Callable[..., Any], target: str) -> Region:
        options = self._options
        region = Region(
            function,
            target=target,
            backend=find_backend(options.backend),
            ledger=self._ledger,
            situation=self._situation,
            bounds=(options.min_length, options.max_length) if function is self._function else (None, None),
        )
        self._regions.append(region)
        return region

    def _keep_compiled(self) -> None:
        """Store what the calls before this one compiled; by now their backward passes are compiled, too."""
        compilations = self._ledger.compilations
        if self._store is not None and len(compilations) > self._num_kept:
            is_new = any(not compilation.was_cached for compilation in compilations[self._num_kept :])
            self._num_kept = len(compilations)
            if is_new:
                self._store.save()

    # Running

    def _run(self, call: Call) -> Any:
        if self._options.may_pad and self._refusal is None:
            try:
                answer = self._run_rows(call) if self._options.mask is not None else self._run_padded(call)
                return pytree.tree_unflatten(*answer) if answer is not None else self._run_whole(call)
            except PaddingRefusedError as error:
                self._refuse(error)
        return self._run_whole(call)

    def _run_whole(self, call: Call) -> Any:
        """Run the call as it came: the first of its kind eagerly, to see its shapes; others compiled, with symbols."""
        if call.kind.num_calls == 1:
            return self._plain(call.bound.args, call.bound.kwargs, is_learning=True)
        return self._compiled(call, call.leaves, SYMBOLIC)

    def _run_rows(self, call: Call) -> _Outputs | None:
        """The rows in groups of similar length, each as long as its longest row; `None` while shapes are unclear."""
        mask = self._reader.find_mask(call)
        roles = self._reader.find_input_roles(call)
        if mask is None or roles is None:
            return None
        self._reference.refuse_statistics()
        values, lengths = self._reader.pad_values(call), read_lengths(mask)
        self._planner.count(lengths, mask.numel())
        if not call.kind.has_probed:
            self._reference.probe(call, roles, values, mask)
            call.kind.has_probed = True
        self._planner.plan(self._look)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        rows = torch.tensor(order, device=mask.device)
        parts = []
        for start, stop in group_rows([lengths[row] for row in order], self._planner.group_cost):
            longest = lengths[order[stop - 1]]
            length, way = self._planner.find_way(longest)
            leaves = take_rows(call.leaves, roles, rows[start:stop], length, values)
            parts.append(_Part(stop - start, length, longest, way, leaves))
        outputs, specs = zip(*(self._run_part(call, part) for part in parts), strict=True)
        self._check(call, parts, outputs, _Batch(mask.shape[1], rows, mask))
        assert call.kind.roles is not None
        return join_rows(outputs, rows, call.kind.roles, mask.shape[1]), specs[0]

    def _run_padded(self, call: Call) -> _Outputs | None:
        """The whole batch at the boundary above its length; `None` while no length has varied."""
        roles = self._reader.find_length_roles(call)
        sizes = {leaf.shape[dim] for leaf, role in zip(call.leaves, roles, strict=True) for dim in role.length_dims}
        if not sizes:
            return None
        if len(sizes) > 1:
            raise PaddingRefusedError(f"its length dims are {sorted(sizes)} long; name those of one length with dims=")
        self._reference.refuse_statistics()
        (length,) = sizes
        self._planner.count([length], length)
        self._planner.plan(self._look)
        if not any(region.has_varied for region in self._regions):
            self._plain(call.bound.args, call.bound.kwargs, is_learning=True)
        target, way = self._planner.find_way(length)
        leaves = take_rows(call.leaves, roles, None, target, self._reader.pad_values(call))
        part = _Part(1, target, length, way, leaves)
        outputs, spec = self._run_part(call, part)
        self._check(call, [part], [outputs], _Batch(length, None, None))
        assert call.kind.roles is not None
        return cut_length(outputs, call.kind.roles, length), spec

    def _run_part(self, call: Call, part: _Part) -> _Outputs:
        """One piece; while times are wanted, how long it took is noted."""
        self._planner.counts.run += part.rows * part.length
        is_timed = self._planner.wants_times
        num_compiled = len(self._ledger.compilations)
        began_s = _now_s(part.leaves) if is_timed else 0.0
        answer = self._compiled(call, part.leaves, part.way)
        if is_timed and len(self._ledger.compilations) == num_compiled:
            self._planner.note(part, _now_s(part.leaves) - began_s, self._look)
        return pytree.tree_flatten(answer)

    def _compiled(self, call: Call, leaves: list[Any], way: Way) -> Any:
        """Return the function with its regions compiled; a call of a new kind may compile, and marks what varies."""
        assert self._whole is not None
        self._planner.counts.pieces += 1
        args, kwargs = call.rebuild(leaves)
        kind = (call.key, way, self._mode(), _kind_of(shapes_of(leaves), call.kind.history.varying))
        if kind in self._known:
            with self._situation.set(way, is_learning=False), self._bounded():
                return self._whole(*args, **kwargs)
        with self._lock, self._situation.set(way, is_learning=True), self._bounded(), compiling(self._options):
            answer = self._whole(*args, **kwargs)
        self._known.add(kind)
        return answer

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_learning: bool = False) -> Any:
        """Return the function as it was written."""
        assert self._whole is not None
        with self._situation.set(None, is_learning=is_learning):
            return self._whole(*args, **kwargs)

    def _bounded(self) -> contextlib.AbstractContextManager[object]:
        """Once a graph had to be refused, nothing is captured any more: what has no compiled code runs eagerly."""
        if self._ledger.num_refused:
            stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("eager_on_recompile")
            return stance
        return contextlib.nullcontext()

    def _mode(self) -> tuple[bool, ...]:
        """Return the modes for which, beside shapes, torch compiles separately."""
        is_training = self._owner is not None and self._owner.training
        autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), is_training, *autocast

    # Whether it is right

    def _check(self, call: Call, parts: Sequence[_Part], outputs: Sequence[list[Any]], batch: _Batch) -> None:
        """Compare what parts gave with the plain function, for the first batches of every way; learn output dims."""
        is_cut = any(part.length != batch.length for part in parts)
        kind = call.kind
        is_new = any(kind.checks[part.way] < self._options.num_checks for part in parts)
        if kind.roles is not None and not is_new and (kind.has_seen_lengths or not is_cut):
            return
        reference, is_random = self._reference.run(call)
        if is_random:
            reference, outputs = self._reference.run_in_evaluation(call, [part.leaves for part in parts])
        found = [kind.roles] if kind.roles is not None else []
        for part, out in zip(parts, outputs, strict=True):
            rows = None if batch.rows is None else (len(batch.rows), part.rows)
            found.append(find_roles(reference, out, length=batch.length, piece_length=part.length, rows=rows))
        roles = [tuple(sorted(set().union(*dims))) for dims in zip(*found, strict=True)]
        whole = (
            cut_length(outputs[0], roles, batch.length)
            if batch.rows is None
            else join_rows(outputs, batch.rows, roles, batch.length)
        )
        tolerance = self._options.tolerance or (_AUTOCAST_TOLERANCE if any(self._mode()[3:]) else None)
        compare(whole, reference, mask=batch.mask, roles=roles, tolerance=tolerance)
        kind.roles, kind.has_seen_lengths = roles, kind.has_seen_lengths or is_cut
        kind.checks.update({part.way for part in parts})

    def _refuse(self, error: PaddingRefusedError) -> None:
        self._refusal = str(error)
        warnings.warn(
            f"{self._name} is neither padded nor split: {error}; its lengths are symbols instead",
            DynamicGraphWarning,
            stacklevel=5,
        )

    # What is fast

    def _look(self) -> CompilationState:
        """Compilations as the planner sees them; they cost nothing while the cost of running is not in seconds."""
        compilations = self._ledger.compilations
        seconds = [compilation.seconds for compilation in compilations if not compilation.was_cached] or [_COMPILE_S]
        return CompilationState(
            self._ledger.num_left,
            frozenset(compilation.way for compilation in compilations),
            statistics.fmean(seconds) if self._planner.has_cost else 0.0,
        )

    def _warn_of_bound(self) -> None:
        """Once, when the bound on compilations is reached: which guard would have needed another one."""
        if self._ledger.num_refused and not self._has_warned:
            self._has_warned = True
            metrics = torch._dynamo.utils.get_compilation_metrics()
            reason = (metrics[-1].recompile_reason if metrics else None) or "it was captured in many pieces"
            warnings.warn(
                f"{self._name} has used its {self._options.max_compilations} compilations; what else comes runs on them"
                f" where their guards hold, and eagerly where not. This guard failed: {' '.join(reason.split())}",
                DynamicGraphWarning,
                stacklevel=3,
            )


def _kind_of(shapes: Shapes, varying: Sequence[tuple[int, ...]]) -> Any:
    """Return the shapes as compiled code tells them apart: of a dim that varies, only whether it is 0, 1 or more."""
    return tuple(
        shape and tuple(min(size, 2) if dim in dims else size for dim, size in enumerate(shape))
        for shape, dims in zip(shapes, varying, strict=True)
    )


def _now_s(leaves: Sequence[Any]) -> float:
    """Return the time, after all work on the device of `leaves` is done; on a CPU that of this thread, whoever else
    runs."""
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def _keep_at_exit(reference: weakref.ref[DynamicGraph]) -> None:
    graph = reference()
    if (
        graph is not None
        and graph._store is not None
        and any(not compilation.was_cached for compilation in graph._ledger.compilations)
    ):
        graph._store.save()
