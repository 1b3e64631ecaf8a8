"""`@dynamic_graph`: one compiled model for all lengths, instead of one for each.

    encoder = ds.dynamic_graph(Encoder(config), mask="mask")     # an nn.Module, changed in place
    hidden = encoder(tokens, mask)                               # tokens (B, T), mask (B, T) of zeros and ones

    @ds.dynamic_graph                                            # or a function, or a class of modules
    def score(x): ...

What happens, in this order. The first call runs eagerly, and shows which dims vary. Repeated blocks are then compiled
once for all their members (`regions.py`), anything else as a whole, with the varying dims as symbols; what an earlier
process compiled is taken from disk (`compiled_cache.py`). With `mask=`, the rows of a batch are sorted by length and
run in groups that are cut to their own longest row (`padding.py`), where the grouping minimises a cost that is measured
as the calls come in (`buckets.py`). With `mask=` or `pad_value=`, lengths may also be padded to a few boundaries, each
compiled for exactly that length; `strategy="auto"` does this where a trial shows that it pays for its compilations.

Why groups: of a batch of 16 sentences, log-normal in length, two thirds is padding. Measured on a Zen 4 core with a
4-layer encoder 128 wide, inference, per batch: 299 ms padded to 512, 50 ms with `torch.compile(dynamic=True)` at the
batch's own length, 24 ms in groups. Symbols in place of numbers cost little there; the padding is what costs.

Padding and splitting are right only for functions that do not look at what was added. They happen only where a mask or
a pad value says that they are meant, and the first batches are compared with the plain function before an answer is
given. Where numbers differ, batches stay as they are, with a warning that says why.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import statistics
import threading
import time
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepseek.compiler.buckets import (
    ASSUMED_COST,
    REPLAN_PATIENCE,
    Cost,
    bucket_of,
    choose_boundaries,
    fit_cost,
    group_rows,
    is_worth_replanning,
)
from deepseek.compiler.compiled_cache import CompiledStore, digest_of
from deepseek.compiler.inductor import compile_graph, start_probing
from deepseek.compiler.padding import (
    InputRole,
    PaddingRefusedError,
    compare,
    cut_length,
    find_input_roles,
    find_roles,
    find_varying,
    join_rows,
    name_leaves,
    read_lengths,
    shapes_of,
    take_rows,
)
from deepseek.compiler.regions import (
    SYMBOLIC,
    Backend,
    Compilation,
    DynamicGraphWarning,
    Ledger,
    Region,
    Situation,
    Way,
    find_repeated,
    share,
    structure_of,
)
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Strategy = Literal["auto", "symbolic", "bucketed"]
T = TypeVar("T")
Shapes = tuple[tuple[int, ...] | None, ...]
_Outputs = tuple[list[Any], Any]  # leaves, and the tree they came from

# Calls after which boundaries are planned, and after which auto tries one.
_PLAN_AFTER = 16
_TRY_AFTER = 64
# Groups that each side of a trial runs, the first of which compiles; and how much faster a boundary must be.
_TRIAL_GROUPS = 9
_TRIAL_GAIN = 1.1
# What compiling for a trial may cost, of the time spent running so far.
_TRIAL_SHARE = 0.05
# What a compilation is taken to cost in a process that has found all of its code on disk.
_COMPILE_S = 10.0
# Times that the cost of a group is fitted to.
_FIT_AFTER, _MAX_SAMPLES = 64, 512
# Shapes of calls that are kept to tell lengths from other dims, and calls that may be unclear about it.
_MAX_HISTORY = 16
_MAX_UNCLEAR = 8
# Of numbers that were computed in 16 bits on the way, relative to the largest.
_AUTOCAST_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Options:
    """How a function is run for changing shapes; the arguments of `dynamic_graph`, which explains them."""

    mask: str | None = None
    dims: Mapping[str, int | Sequence[int]] | None = None
    pad_value: float | Mapping[str, float] | None = None
    strategy: Strategy = "auto"
    boundaries: Sequence[int] = ()
    max_compilations: int = 8
    min_length: int | None = None
    max_length: int | None = None
    num_checks: int = 2
    tolerance: float | None = None
    cost: Cost | None = None
    backend: str | Backend = "inductor"
    cache: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ConfigError(explain_unknown("strategy", self.strategy, get_args(Strategy)))
        if self.max_compilations < 1:
            raise ConfigError(f"max_compilations={self.max_compilations} compiles nothing; give at least 1")
        if (self.strategy == "bucketed" or self.boundaries) and not self.may_pad:
            raise ConfigError(
                "buckets pad, and padding changes numbers unless the function ignores it; "
                "name its mask with mask=, or give pad_value= if what is padded does not matter"
            )
        if self.num_checks < 1:
            raise ConfigError("num_checks=0 would trust padding blindly; give at least 1")
        if any(boundary < 1 for boundary in self.boundaries):
            raise ConfigError(f"boundaries={tuple(self.boundaries)} must be lengths of at least 1")

    @property
    def may_pad(self) -> bool:
        return self.mask is not None or self.pad_value is not None


@dataclass(frozen=True)
class Explanation:
    """What `explain()` answers; printed, it is text."""

    target: str
    strategy: str
    reason: str
    blocks: tuple[str, ...]
    boundaries: tuple[int, ...]
    compilations: tuple[Compilation, ...]
    max_compilations: int
    num_calls: int
    num_pieces: int
    padding_share: float
    padding_share_before: float
    num_cache_hits: int
    num_loaded: int

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.strategy} lengths; {self.reason}"]
        lines += [f"  compiled once: {block}" for block in self.blocks]
        lines += [f"  boundaries: {', '.join(map(str, self.boundaries))}"] if self.boundaries else []
        lines.append(f"  compilations: {len(self.compilations)} of at most {self.max_compilations}")
        lines += [f"    {each}" for each in self.compilations]
        lines.append(f"  graphs loaded from disk: {self.num_loaded}, used: {self.num_cache_hits}")
        lines.append(
            f"  {self.num_calls} calls ran as {self.num_pieces} pieces; "
            f"{self.padding_share:.0%} of what ran was padding, {self.padding_share_before:.0%} of what came in"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Call:
    """One call, taken apart into named leaves."""

    bound: inspect.BoundArguments
    names: list[str]
    leaves: list[Any]
    spec: Any
    shapes: tuple[tuple[int, ...] | None, ...]

    def rebuild(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments like those of the call, with other leaves."""
        bound = inspect.BoundArguments(self.bound.signature, dict(pytree.tree_unflatten(leaves, self.spec)))
        return bound.args, bound.kwargs


@dataclass(frozen=True)
class _Part:
    """A piece of a batch that runs by itself, `length` long where its longest row is `longest`."""

    leaves: list[Any]
    rows: int
    length: int
    way: Way
    longest: int


@dataclass(frozen=True)
class _Batch:
    """What parts are parts of: its length, and for groups of rows the order they are in and the mask."""

    length: int
    rows: Tensor | None
    mask: Tensor | None


@dataclass
class _Counts:
    """What came in and what ran, in calls and in positions."""

    calls: int = 0
    pieces: int = 0
    real: int = 0
    run: int = 0
    arrived: int = 0
    lengths: Counter[int] = field(default_factory=Counter)


@dataclass
class _Trial:
    """One boundary against symbols, in turns: seconds per position of each."""

    lowest: int
    boundary: int
    boundaries: tuple[int, ...]
    seconds: dict[Way, list[float]]

    def next_way(self, length: int) -> Way:
        """The side whose turn it is; lengths of other buckets have no part in it."""
        if not self.lowest < length <= self.boundary:
            return SYMBOLIC
        return min(self.seconds, key=lambda way: len(self.seconds[way]))

    @property
    def is_over(self) -> bool:
        return all(len(each) >= _TRIAL_GROUPS for each in self.seconds.values())

    @property
    def gain(self) -> float:
        symbolic, static = (statistics.median(self.seconds[way][1:]) for way in (SYMBOLIC, self.boundary))
        return symbolic / static


class DynamicGraph:
    """A function, or the forward pass of a module, that is compiled for changing shapes. Made by `dynamic_graph`."""

    def __init__(self, function: Callable[..., Any], options: Options, owner: nn.Module | None = None) -> None:
        self._function, self._options, self._owner = function, options, owner
        self._start()

    def _start(self) -> None:
        """Everything that is learned, empty."""
        options = self._options
        self._name = type(self._owner).__name__ if self._owner is not None else self._function.__qualname__
        if self._owner is None:
            functools.update_wrapper(self, self._function)
        self._signature = inspect.signature(self._function)
        self._lock = threading.RLock()
        self._situation = Situation()
        self._ledger = Ledger(options.max_compilations)
        self._regions: list[Region] = []
        self._blocks: tuple[str, ...] = ()
        self._whole: Callable[..., Any] | None = None
        self._store: CompiledStore | None = None
        self._num_loaded, self._num_kept = 0, 0
        self._known: set[Any] = set()
        self._history: list[Shapes] = []
        self._varying: list[tuple[int, ...]] = []
        self._counts = _Counts()
        self._samples: list[tuple[int, int, float]] = []
        self._cost = options.cost
        self._boundaries = tuple(sorted(options.boundaries))
        self._planned_at, self._has_tried = 0, False
        self._trial: _Trial | None = None
        self._reason = "no boundary has been tried"
        self._refusal: str | None = None
        self._roles: list[tuple[int, ...]] | None = None
        self._has_seen_lengths, self._has_probed, self._has_warned = False, False, False
        self._checks: Counter[Way] = Counter()
        self._num_unclear = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._situation.is_busy:
            return self._function(*args, **kwargs)
        with self._lock:
            self._prepare()
            self._keep_compiled()
        call = self._take_apart(args, kwargs)
        self._counts.calls += 1
        try:
            return self._run(call)
        finally:
            self._warn_of_bound()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs; what was compiled and learned is learned again."""
        return {"_function": self._function, "_options": self._options, "_owner": self._owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def explain(self) -> Explanation:
        """Which graphs were compiled for which shapes, and why; what is padding; what came from disk."""
        counts = self._counts
        return Explanation(
            target=self._name,
            strategy="bucketed" if self._boundaries and self._refusal is None else "symbolic",
            reason=self._refusal or self._reason,
            blocks=self._blocks,
            boundaries=self._boundaries,
            compilations=tuple(self._ledger.compilations),
            max_compilations=self._options.max_compilations,
            num_calls=counts.calls,
            num_pieces=counts.pieces,
            padding_share=1 - counts.real / counts.run if counts.run else 0.0,
            padding_share_before=1 - counts.real / counts.arrived if counts.arrived else 0.0,
            num_cache_hits=sum(each.was_cached for each in self._ledger.compilations),
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
            self._store = CompiledStore(digest_of(self._name, *_describe(self._function, self._owner)))
            self._num_loaded = self._store.load()
            atexit.register(_keep_at_exit, weakref.ref(self))

    def _make_region(self, function: Callable[..., Any], target: str) -> Region:
        options = self._options
        region = Region(
            function,
            target=target,
            backend=_find_backend(options.backend),
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
            is_new = any(not each.was_cached for each in compilations[self._num_kept :])
            self._num_kept = len(compilations)
            if is_new:
                self._store.save()

    # Running

    def _take_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        bound = self._signature.bind(*args, **kwargs)
        names, leaves, spec = name_leaves(bound.arguments)
        shapes = shapes_of(leaves)
        if self._history and len(shapes) != len(self._history[0]):
            self._history.clear()
        if shapes not in self._history and len(self._history) < _MAX_HISTORY:
            self._history.append(shapes)
            self._varying = find_varying(self._history)
        return _Call(bound, names, leaves, spec, shapes)

    def _run(self, call: _Call) -> Any:
        if self._options.may_pad and self._refusal is None:
            try:
                answer = self._run_rows(call) if self._options.mask is not None else self._run_padded(call)
                return pytree.tree_unflatten(*answer) if answer is not None else self._run_whole(call)
            except PaddingRefusedError as error:
                self._refuse(error)
        return self._run_whole(call)

    def _run_whole(self, call: _Call) -> Any:
        """The call as it came: the first one eagerly, to see its shapes; later ones compiled, with symbols."""
        if self._counts.calls == 1:
            return self._plain(call.bound.args, call.bound.kwargs, is_learning=True)
        return self._compiled(call.bound.args, call.bound.kwargs, call.shapes, SYMBOLIC)

    def _run_rows(self, call: _Call) -> _Outputs | None:
        """The rows in groups of similar length, each as long as its longest row; `None` while shapes are unclear."""
        mask = self._find_mask(call)
        roles = self._find_input_roles(call)
        if mask is None or roles is None:
            return None
        self._refuse_statistics()
        values, lengths = self._pad_values(call), read_lengths(mask)
        self._count(lengths, mask.numel())
        self._probe(call, roles, values, mask)
        self._plan()
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        rows = torch.tensor(order, device=mask.device)
        parts = []
        for start, stop in group_rows([lengths[row] for row in order], self._group_cost):
            longest = lengths[order[stop - 1]]
            length, way = self._length_and_way(longest)
            leaves = take_rows(call.leaves, roles, rows[start:stop], length, values)
            parts.append(_Part(leaves, stop - start, length, way, longest))
        outputs, specs = zip(*(self._run_part(call, part) for part in parts), strict=True)
        self._check(call, parts, outputs, _Batch(mask.shape[1], rows, mask))
        assert self._roles is not None
        return join_rows(outputs, rows, self._roles, mask.shape[1]), specs[0]

    def _run_padded(self, call: _Call) -> _Outputs | None:
        """The whole batch at the boundary above its length; `None` while no length has varied."""
        roles = self._find_length_roles(call)
        sizes = {leaf.shape[dim] for leaf, role in zip(call.leaves, roles, strict=True) for dim in role.length_dims}
        if not sizes:
            return None
        if len(sizes) > 1:
            raise PaddingRefusedError(f"its length dims are {sorted(sizes)} long; name those of one length with dims=")
        self._refuse_statistics()
        (length,) = sizes
        self._count([length], length)
        self._plan()
        if not any(region.has_varied for region in self._regions):
            self._plain(call.bound.args, call.bound.kwargs, is_learning=True)
        target, way = self._length_and_way(length)
        part = _Part(take_rows(call.leaves, roles, None, target, self._pad_values(call)), 1, target, way, length)
        outputs, spec = self._run_part(call, part)
        self._check(call, [part], [outputs], _Batch(length, None, None))
        assert self._roles is not None
        return cut_length(outputs, self._roles, length), spec

    def _run_part(self, call: _Call, part: _Part) -> _Outputs:
        """One piece; while times are wanted, how long it took is noted."""
        args, kwargs = call.rebuild(part.leaves)
        self._counts.run += part.rows * part.length
        is_timed = self._trial is not None or len(self._samples) < _MAX_SAMPLES
        num_compiled = len(self._ledger.compilations)
        began_s = _now_s(part.leaves) if is_timed else 0.0
        answer = self._compiled(args, kwargs, shapes_of(part.leaves), part.way)
        if is_timed and len(self._ledger.compilations) == num_compiled:
            self._note(part, _now_s(part.leaves) - began_s)
        return pytree.tree_flatten(answer)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Shapes, way: Way) -> Any:
        """The function with its regions compiled; a call of a new kind may compile, and marks what varies."""
        assert self._whole is not None
        self._counts.pieces += 1
        kind = (way, self._mode(), _kind_of(shapes, self._varying))
        if kind in self._known:
            with self._situation.set(way, is_learning=False), self._bounded():
                return self._whole(*args, **kwargs)
        with self._lock, self._situation.set(way, is_learning=True), self._bounded(), _compiling(self._options):
            answer = self._whole(*args, **kwargs)
        self._known.add(kind)
        return answer

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_learning: bool = False) -> Any:
        """The function as it was written."""
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
        """What, beside shapes, torch compiles separately for."""
        is_training = self._owner is not None and self._owner.training
        autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), is_training, *autocast

    # What arguments mean

    def _find_mask(self, call: _Call) -> Tensor | None:
        name = self._options.mask
        mask = call.leaves[call.names.index(name)] if name in call.names else None
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
            seen = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(f"the mask {name!r} of {self._name} is {seen}; expected (rows, length) of zeros and ones")
        return mask

    def _find_input_roles(self, call: _Call) -> list[InputRole] | None:
        """What the dims of all arguments mean; `None` while shapes do not tell, which is refused in the end."""
        if self._options.mask not in call.names:
            return None
        mask = call.names.index(self._options.mask)
        try:
            return find_input_roles(call.shapes, mask, self._history, self._given_dims(call))
        except PaddingRefusedError:
            self._num_unclear += 1
            if self._num_unclear >= _MAX_UNCLEAR:
                raise
            return None

    def _find_length_roles(self, call: _Call) -> list[InputRole]:
        """The dims that are lengths where no mask says how long rows are: those given, or all that varied but rows."""
        given = self._given_dims(call)
        if given:
            return [InputRole(False, given.get(index, ())) for index in range(len(call.leaves))]
        varying = self._varying
        ranks = [len(shape or ()) for shape in call.shapes]
        return [
            InputRole(False, tuple(dim for dim in dims if dim > 0 or rank == 1))
            for dims, rank in zip(varying, ranks, strict=True)
        ]

    def _given_dims(self, call: _Call) -> dict[int, tuple[int, ...]]:
        given = {}
        for name, dims in (self._options.dims or {}).items():
            for index, leaf in enumerate(call.names):
                shape = call.shapes[index]
                if (leaf == name or leaf.startswith(f"{name}[")) and shape is not None:
                    given[index] = tuple(
                        _checked_dim(dim, len(shape), name) for dim in ([dims] if isinstance(dims, int) else dims)
                    )
        return given

    def _pad_values(self, call: _Call) -> list[float]:
        value = self._options.pad_value
        if isinstance(value, Mapping):
            return [value.get(name, value.get(name.partition("[")[0], 0.0)) for name in call.names]
        return [value or 0.0] * len(call.leaves)

    def _probe(self, call: _Call, roles: list[InputRole], values: list[float], mask: Tensor) -> None:
        """Run the batch and half of it, in rows and in length, to see which dims follow inside the model."""
        if self._has_probed:
            return
        num_rows, length = mask.shape
        half = torch.arange(num_rows // 2) if num_rows > 1 else torch.zeros(2, dtype=torch.long)
        part = take_rows(call.leaves, roles, half.to(mask.device), length // 2 if length > 1 else 2, values)
        with self._without_traces():
            self._plain(call.bound.args, call.bound.kwargs, is_learning=True)
            try:
                self._plain(*call.rebuild(part), is_learning=True)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise PaddingRefusedError(f"it does not run on half of a batch ({_first_line(error)})") from error
        self._has_probed = True

    # Whether it is right

    def _check(self, call: _Call, parts: Sequence[_Part], outputs: Sequence[list[Any]], batch: _Batch) -> None:
        """Compare what parts gave with the plain function, for the first batches of every way; learn output dims."""
        is_cut = any(part.length != batch.length for part in parts)
        is_new = any(self._checks[part.way] < self._options.num_checks for part in parts)
        if self._roles is not None and not is_new and (self._has_seen_lengths or not is_cut):
            return
        reference, is_random = self._run_reference(call)
        if is_random:
            reference, outputs = self._run_in_evaluation(call, parts)
        found = [self._roles] if self._roles is not None else []
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
        self._roles, self._has_seen_lengths = roles, self._has_seen_lengths or is_cut
        self._checks.update({part.way for part in parts})

    def _run_reference(self, call: _Call) -> tuple[list[Any], bool]:
        """The outputs of the plain function, and whether it drew random numbers for them."""
        with self._without_traces():
            before = torch.get_rng_state()
            reference = pytree.tree_leaves(self._plain(call.bound.args, call.bound.kwargs))
            return reference, not torch.equal(before, torch.get_rng_state())

    def _run_in_evaluation(self, call: _Call, parts: Sequence[_Part]) -> tuple[list[Any], list[list[Any]]]:
        """The outputs of the batch and of its parts from the plain function with dropout switched off."""
        if self._owner is None:
            raise PaddingRefusedError("it draws random numbers, so that there is nothing to compare its numbers with")
        modes = {module: module.training for module in self._owner.modules()}
        self._owner.eval()
        try:
            reference, is_random = self._run_reference(call)
            if is_random:
                raise PaddingRefusedError("it draws random numbers even in evaluation mode, so nothing can be compared")
            with self._without_traces():
                return reference, [pytree.tree_leaves(self._plain(*call.rebuild(part.leaves))) for part in parts]
        finally:
            for module, is_training in modes.items():
                module.training = is_training

    @contextlib.contextmanager
    def _without_traces(self) -> Iterator[None]:
        """Run something extra: no gradients, and random numbers and buffers afterwards as before.

        A forward pass that changes buffers changes them once for each piece, so it is refused.
        """
        buffers = [] if self._owner is None else list(self._owner.buffers())
        kept = [each.clone() for each in buffers]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
            changed = [each for each, before in zip(buffers, kept, strict=True) if not torch.equal(each, before)]
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
        if changed:
            raise PaddingRefusedError("it changes its buffers in each call, and would do so for each piece")

    def _refuse_statistics(self) -> None:
        """Layers that average over the batch see what was added to it."""
        modules = () if self._owner is None else self._owner.modules()
        if any(isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training for each in modules):
            raise PaddingRefusedError("in training, its batch normalization would average over padding")

    def _refuse(self, error: PaddingRefusedError) -> None:
        self._refusal = str(error)
        warnings.warn(
            f"{self._name} is neither padded nor split: {error}; its lengths are symbols instead",
            DynamicGraphWarning,
            stacklevel=5,
        )

    # What is fast

    def _count(self, lengths: list[int], num_positions: int) -> None:
        self._counts.lengths.update(lengths)
        self._counts.real += sum(lengths)
        self._counts.arrived += num_positions

    def _note(self, part: _Part, seconds: float) -> None:
        """Keep a time for the cost and for the trial."""
        if len(self._samples) < _MAX_SAMPLES and part.way == SYMBOLIC:
            self._samples.append((part.rows, part.length, seconds))
        if self._trial is not None and self._trial.lowest < part.longest <= self._trial.boundary:
            self._trial.seconds[part.way].append(seconds / part.rows / part.longest)
            if self._trial.is_over:
                self._end_trial(self._trial)

    def _group_cost(self, rows: int, length: int) -> float:
        return (self._cost or ASSUMED_COST)(rows, bucket_of(length, self._boundaries) or length)

    def _length_and_way(self, length: int) -> tuple[int, Way]:
        """How long a piece is run, and by which code. A length of one is avoided: torch compiles it separately."""
        if self._trial is not None:
            way = self._trial.next_way(length)
            return (self._trial.boundary, way) if way != SYMBOLIC else (max(2, length), SYMBOLIC)
        boundary = bucket_of(length, self._boundaries)
        return (max(2, length), SYMBOLIC) if boundary is None else (boundary, boundary)

    def _plan(self) -> None:
        """Fit the cost once there are times; plan, try and replan boundaries when it is time for that."""
        calls, strategy = self._counts.calls, self._options.strategy
        if self._cost is None and len(self._samples) >= _FIT_AFTER:
            self._cost = fit_cost(self._samples)
        if strategy == "symbolic" or self._options.boundaries or self._trial is not None:
            return
        if strategy == "auto" and not self._boundaries:
            can_try = calls >= _TRY_AFTER and self._cost is not None and self._ledger.num_left > 1
            if can_try and not self._has_tried and self._compile_cost < _TRIAL_SHARE * self._spent_s:
                self._start_trial()
        elif calls >= _PLAN_AFTER and (not self._boundaries or calls - self._planned_at >= REPLAN_PATIENCE):
            self._replan()

    def _replan(self) -> None:
        """Move to other boundaries where that pays for compiling them."""
        room = self._ledger.num_left + len({each.way for each in self._ledger.compilations} & set(self._boundaries))
        if room < 1:
            return
        counts, cost = self._counts.lengths, self._length_cost
        plan = choose_boundaries(counts, max_buckets=room, cost=cost, compile_cost=self._compile_cost)
        since = self._counts.calls - self._planned_at
        if not self._boundaries or is_worth_replanning(
            self._boundaries, plan, counts, cost=cost, compile_cost=self._compile_cost, batches_since=since
        ):
            self._boundaries, self._reason = plan.boundaries, f"planned from {counts.total()} lengths"
        self._planned_at = self._counts.calls

    def _start_trial(self) -> None:
        """Try the boundary under which most of the work would run."""
        counts, room = self._counts.lengths, self._ledger.num_left
        plan = choose_boundaries(counts, max_buckets=room, cost=self._length_cost, compile_cost=self._compile_cost)
        work: Counter[int] = Counter()
        for length, count in counts.items():
            work[bucket_of(length, plan.boundaries) or length] += length * count
        boundary = work.most_common(1)[0][0]
        lowest = max((each for each in plan.boundaries if each < boundary), default=0)
        self._has_tried = True
        self._trial = _Trial(lowest, boundary, plan.boundaries, {SYMBOLIC: [], boundary: []})

    def _end_trial(self, trial: _Trial) -> None:
        """Adopt the boundaries if the one that was tried is faster, padding included, and the rest will pay."""
        self._trial, gain = None, trial.gain
        price_s = self._compile_cost * (len(trial.boundaries) - 1)
        won_s = self._spent_s * (1 - 1 / gain)
        tried = f"boundary {trial.boundary} ran at {gain:.2f} times the speed of symbols"
        if gain < _TRIAL_GAIN:
            self._reason = tried
        elif won_s < price_s:
            self._reason = f"{tried}, which would win {won_s:.1f} s and cost {price_s:.1f} s to compile"
        else:
            self._boundaries, self._planned_at = trial.boundaries, self._counts.calls
            self._reason = tried

    def _length_cost(self, length: int) -> float:
        cost = self._cost or ASSUMED_COST
        return cost(1, length) - cost.overhead

    @property
    def _spent_s(self) -> float:
        """Seconds that all calls so far have run, about."""
        return (
            statistics.fmean(seconds for *_, seconds in self._samples) * self._counts.pieces if self._samples else 0.0
        )

    @property
    def _compile_cost(self) -> float:
        """Seconds of one compilation, as they were; nothing while the cost of running is not in seconds."""
        seconds = [each.seconds for each in self._ledger.compilations if not each.was_cached] or [_COMPILE_S]
        return 0.0 if self._cost is None else statistics.fmean(seconds)

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


@overload
def dynamic_graph(target: T, /) -> T: ...
@overload
def dynamic_graph(target: T, /, **options: Any) -> T: ...
@overload
def dynamic_graph(**options: Any) -> Callable[[T], T]: ...
def dynamic_graph(target: Any = None, /, **options: Any) -> Any:
    """Compile a function, an `nn.Module`, or a class of modules for changing shapes; options as below.

    A module is changed in place and returned: its parameters keep their names, and `module.explain()` tells what
    happened; so does `function.explain()`. Training, evaluation, dropout and autocast work as before.

    - `mask`: the argument (rows, length) of zeros and ones that says which positions count. Giving it promises that
      rows do not depend on each other, and that outputs where the mask is zero are not used: they are zeros then.
      Batches are run in groups of similar length.
    - `dims`: length dims by argument, `{"x": 1}`, where shapes alone do not tell them.
    - `pad_value`: permits padding to boundaries, with this number (or these, by argument).
    - `strategy`: `auto`, `symbolic` or `bucketed`; `boundaries`: lengths to compile for, instead of learned ones.
    - `max_compilations`: never more graphs than this (8); beyond it what does not fit runs eagerly, with a warning that
      names the guard.
    - `min_length`, `max_length`: the range of the lengths, if it is known.
    - `num_checks`: batches of each kind that are compared with the plain function (2); `tolerance`: how far they may
      differ, relative to the largest number.
    - `cost`: a `buckets.Cost` instead of a measured one; grouping is then the same in every run.
    - `backend`: of torch.compile; `cache`: whether compiled code is kept on disk for the next process.

    Raises `ConfigError` for options that are unknown or contradict each other, and for what cannot be compiled.

    >>> @dynamic_graph(backend="eager", cache=False)
    ... def double(x):
    ...     return 2 * x
    >>> [double(torch.ones(length)).sum().item() for length in (3, 5, 7)]
    [6.0, 10.0, 14.0]
    >>> len(double.explain().compilations)
    1
    """
    known = {each.name for each in fields(Options)}
    for name in options:
        if name not in known:
            raise ConfigError(explain_unknown("option of dynamic_graph", name, known))
    chosen = Options(**options)
    if target is None:
        return lambda given: _decorate(given, chosen)
    return _decorate(target, chosen)


def _decorate(target: Any, options: Options) -> Any:
    _find_backend(options.backend)
    if isinstance(target, nn.Module):
        return _decorate_module(target, options)
    if isinstance(target, type):
        return _decorate_class(target, options)
    if not callable(target):
        raise ConfigError(f"dynamic_graph was given a {type(target).__name__}; give a function or an nn.Module")
    if inspect.iscoroutinefunction(target) or inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise ConfigError(
            f"{target.__qualname__} is a generator or coroutine; dynamic_graph takes functions that return"
        )
    if not hasattr(target, "__code__") and not isinstance(target, types.MethodType):
        raise ConfigError(f"{target!r} has no Python code to compile; wrap it in a function with def")
    _check_names(target, options)
    return DynamicGraph(target, options)


def _decorate_module(module: nn.Module, options: Options) -> nn.Module:
    if isinstance(module.__dict__.get("forward"), DynamicGraph):
        raise ConfigError(f"this {type(module).__name__} is a dynamic graph already; make it one once")
    _check_names(module.forward, options)
    graph = DynamicGraph(module.forward, options, owner=module)
    module.forward = graph
    if not hasattr(module, "explain"):
        module.__dict__["explain"] = graph.explain
    return module


def _decorate_class(kind: type, options: Options) -> type:
    if not issubclass(kind, nn.Module):
        raise ConfigError(f"class {kind.__name__} is no nn.Module; dynamic_graph takes functions and modules")
    _check_names(kind.forward, options)
    initialize = kind.__init__

    @functools.wraps(initialize)
    def initialize_dynamic(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        if not isinstance(self.__dict__.get("forward"), DynamicGraph):
            _decorate_module(self, options)

    kind.__init__ = initialize_dynamic  # type: ignore[method-assign]
    return kind


def _check_names(function: Callable[..., Any], options: Options) -> None:
    """Every argument that the options name exists."""
    parameters = inspect.signature(function).parameters
    is_open = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    named = [options.mask] if options.mask else []
    named += [*(options.dims or ())]
    named += [*options.pad_value] if isinstance(options.pad_value, Mapping) else []
    for name in named:
        if not is_open and name.partition("[")[0] not in parameters:
            raise ConfigError(explain_unknown("argument", name, parameters))


def _kind_of(shapes: Shapes, varying: Sequence[tuple[int, ...]]) -> Any:
    """Shapes as compiled code tells them apart: of a dim that varies, only whether it is 0, 1 or more."""
    return tuple(
        shape and tuple(min(size, 2) if dim in dims else size for dim, size in enumerate(shape))
        for shape, dims in zip(shapes, varying, strict=True)
    )


def _checked_dim(dim: int, rank: int, name: str) -> int:
    if not -rank <= dim < rank:
        raise ConfigError(f"dims names dim {dim} of {name!r}, which has {rank} dims")
    return dim % rank


def _find_backend(backend: str | Backend) -> Backend:
    if callable(backend):
        return backend
    if backend == "inductor":
        return compile_graph
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ConfigError(explain_unknown("backend", backend, torch.compiler.list_backends(exclude_tags=())))
    found: Backend = torch._dynamo.backends.registry.lookup_backend(backend)
    return found


@contextlib.contextmanager
def _compiling(options: Options) -> Iterator[None]:
    """Sizes that happen to be equal are not taken for one, and torch's own bound does not come before ours."""
    patch_shapes: Any = torch.fx.experimental._config.patch  # type: ignore[attr-defined]
    limit = max(torch._dynamo.config.recompile_limit, 8 * (options.max_compilations + 1))
    with (
        patch_shapes(use_duck_shape=False),
        torch._dynamo.config.patch(recompile_limit=limit),
        warnings.catch_warnings(),
    ):
        # torch looks at this attribute of every input, and hides its own warning unless warnings are errors.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


def _describe(function: Callable[..., Any], owner: nn.Module | None) -> tuple[str, ...]:
    """What decides the compiled code: the source of a function, the structure and the classes of a module."""
    if owner is None:
        return (_code_text(function.__code__),)
    kinds = {type(module): None for module in owner.modules()}
    codes = [f"{kind.__qualname__} {_code_text(kind.forward.__code__)}" for kind in kinds if _has_code(kind)]
    return str(structure_of(owner)), *codes


def _has_code(kind: type) -> bool:
    return hasattr(getattr(kind, "forward", None), "__code__")


def _code_text(code: types.CodeType) -> str:
    """Bytecode, names and constants, also of functions inside; no addresses and no line numbers."""
    constants = [_code_text(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _now_s(leaves: Sequence[Any]) -> float:
    """The time, after all work on the device of `leaves` is done; on a CPU that of this thread, whoever else runs."""
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _keep_at_exit(reference: weakref.ref[DynamicGraph]) -> None:
    graph = reference()
    if (
        graph is not None
        and graph._store is not None
        and any(not each.was_cached for each in graph._ledger.compilations)
    ):
        graph._store.save()
