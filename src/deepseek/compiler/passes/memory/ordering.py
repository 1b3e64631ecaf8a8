"""When each buffer of a graph is alive, in which order the steps need least memory, and who may write over whom.

Pure policy: a graph is steps that read and create named buffers of known size; nothing here knows of tensors. `peak.py`
builds the steps from a captured graph and applies the order and the reuses to it.

* `profile` gives the bytes alive while each step runs: everything created and still to be read, and the step's scratch.
* `reorder` finds the order of least peak. The bytes alive after a set of steps depend on the set alone, so the best
  order is a path through such sets whose largest value is least (Dijkstra's search with max for sum). A step that is
  ready, needs no more than was needed before and frees at least what it creates is taken at once: putting it off never
  helps. With that, chains of hundreds of steps with narrow branches are solved exactly; where the number of sets grows
  over a limit, a beam search gives a good order, and the answer says that it is not proven best.
* `reuse` lets a step write its result into an input of the same size that nobody reads later.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepseek.core.errors import ConfigError

# States of the exact search; about two seconds of it.
MAX_STATES = 20_000
_BEAM_WIDTH = 32


@dataclass(frozen=True)
class GraphStep:
    """One operation."""

    name: str
    reads: frozenset[str] = frozenset()
    """Buffers that must be alive while it runs."""
    creates: tuple[str, ...] = ()
    follows: frozenset[str] = frozenset()
    """Steps that must have run before, for whatever reason."""
    scratch_bytes: int = 0
    """Taken while it runs and given back at its end."""
    overwrites: tuple[str, ...] = ()
    """Inputs that it could write its result into, if nobody needed them later."""


@dataclass(frozen=True)
class BufferGraph:
    """Steps in one possible order, over buffers."""

    steps: tuple[GraphStep, ...]
    sizes_bytes: Mapping[str, int]
    given: frozenset[str] = frozenset()
    """Buffers of the caller: inputs and weights. They are there before and after, and are not counted."""
    kept: frozenset[str] = frozenset()
    """Buffers that outlive the last step: results."""


@dataclass(frozen=True)
class Order:
    """An order of steps and what it costs."""

    names: tuple[str, ...]
    peak_bytes: int
    is_optimal: bool
    """Whether no order has a lower peak; false where the search was cut short."""


@dataclass(frozen=True)
class Lifetime:
    """Indices in an order between which a buffer is alive, both included."""

    first: int
    last: int


def find_lifetimes(graph: BufferGraph, reused: Mapping[str, str] | None = None) -> dict[str, Lifetime]:
    """Find when each counted buffer is alive; `reused` names, for a step, the buffer that it writes its result into."""
    owner = _owners(graph, reused or {})
    lifetimes: dict[str, Lifetime] = {}
    for index, step in enumerate(graph.steps):
        for name in (*step.creates, *step.reads):
            buffer = owner.get(name, name)
            if buffer not in graph.given:
                first = lifetimes[buffer].first if buffer in lifetimes else index
                lifetimes[buffer] = Lifetime(first, index)
    last = len(graph.steps) - 1
    for name in graph.kept - graph.given:
        buffer = owner.get(name, name)
        lifetimes[buffer] = Lifetime(lifetimes[buffer].first, last)
    return lifetimes


def profile(graph: BufferGraph, reused: Mapping[str, str] | None = None) -> list[int]:
    """Count the bytes alive while each step runs, its scratch included."""
    alive = [step.scratch_bytes for step in graph.steps]
    for buffer, lifetime in find_lifetimes(graph, reused).items():
        for index in range(lifetime.first, lifetime.last + 1):
            alive[index] += graph.sizes_bytes[buffer]
    return alive


def find_peak(graph: BufferGraph, reused: Mapping[str, str] | None = None) -> int:
    """Find the largest number of bytes alive at once.

    >>> steps = (GraphStep("a", creates=("x",)), GraphStep("b", frozenset({"x"}), ("y",)))
    >>> find_peak(BufferGraph(steps, {"x": 8, "y": 2}))
    10
    """
    return max(profile(graph, reused), default=0)


def arrange(graph: BufferGraph, names: Sequence[str]) -> BufferGraph:
    """`graph` with its steps in the order of `names`; raises `ConfigError` where a step would come too early."""
    by_name = {step.name: step for step in graph.steps}
    needs = _predecessors(graph)
    done: set[str] = set()
    for name in names:
        missing = needs[name] - done
        if missing:
            raise ConfigError(f"step {name} is put before {min(missing)}, which it follows; keep them in that order")
        done.add(name)
    if len(names) != len(by_name) or done != set(by_name):
        raise ConfigError(f"{len(names)} steps were ordered and the graph has {len(by_name)}; name each of them once")
    return BufferGraph(tuple(by_name[name] for name in names), graph.sizes_bytes, graph.given, graph.kept)


def reorder(graph: BufferGraph, *, max_states: int = MAX_STATES) -> Order:
    """Find the order of least peak; the order that is there, where none is better.

    >>> sizes = {"big": 100, "wide": 100, "small": 1, "thin": 1, "sum": 1}
    >>> steps = (
    ...     GraphStep("load", creates=("big",)), GraphStep("grow", creates=("wide",)),
    ...     GraphStep("cut", frozenset({"big"}), ("small",)), GraphStep("trim", frozenset({"wide"}), ("thin",)),
    ...     GraphStep("add", frozenset({"small", "thin"}), ("sum",)),
    ... )
    >>> reorder(BufferGraph(steps, sizes, kept=frozenset({"sum"})))
    Order(names=('load', 'cut', 'grow', 'trim', 'add'), peak_bytes=102, is_optimal=True)
    """
    current = Order(tuple(step.name for step in graph.steps), find_peak(graph), is_optimal=False)
    search = _Search(graph)
    exact = search.find_best(max_states)
    found = exact if exact is not None else search.find_good(_BEAM_WIDTH)
    best = found if found.peak_bytes < current.peak_bytes else current
    return Order(best.names, best.peak_bytes, is_optimal=exact is not None)


def reuse(graph: BufferGraph) -> dict[str, str]:
    """Find, for each step that can, the buffer that its result is written into."""
    reused: dict[str, str] = {}
    for index, step in enumerate(graph.steps):
        if len(step.creates) != 1:
            continue
        (created,) = step.creates
        lifetimes = find_lifetimes(graph, reused)
        owner = _owners(graph, reused)
        for name in step.overwrites:
            buffer = owner.get(name, name)
            is_free = buffer in lifetimes and lifetimes[buffer].last == index and buffer not in _kept(graph, owner)
            if is_free and graph.sizes_bytes[buffer] == graph.sizes_bytes[created]:
                reused[step.name] = name
                break
    return reused


def _owners(graph: BufferGraph, reused: Mapping[str, str]) -> dict[str, str]:
    """For each created buffer that was written into another, that other one, followed to its origin."""
    owner: dict[str, str] = {}
    for step in graph.steps:
        if step.name in reused:
            target = reused[step.name]
            owner[step.creates[0]] = owner.get(target, target)
    return owner


def _kept(graph: BufferGraph, owner: Mapping[str, str]) -> set[str]:
    return {owner.get(name, name) for name in graph.kept}


def _predecessors(graph: BufferGraph) -> dict[str, set[str]]:
    """Return the steps that each step follows: those that create what it reads, and those it names."""
    creator = {buffer: step.name for step in graph.steps for buffer in step.creates}
    return {
        step.name: {creator[buffer] for buffer in step.reads if buffer in creator and creator[buffer] != step.name}
        | step.follows
        for step in graph.steps
    }


@dataclass(order=True)
class _State:
    """A set of steps that have run, and the best way of running them found so far."""

    peak_bytes: int
    alive_bytes: int
    num_left: int
    done: int = field(compare=False)
    path: tuple[int, tuple] | None = field(compare=False, default=None)  # type: ignore[type-arg]


class _Search:
    """The search for an order, over sets of steps as bits of an integer."""

    def __init__(self, graph: BufferGraph) -> None:
        self.graph = graph
        indices = {step.name: index for index, step in enumerate(graph.steps)}
        needs = _predecessors(graph)
        self.needs = [sum(1 << indices[name] for name in needs[step.name]) for step in graph.steps]
        self.successors: list[list[int]] = [[] for _ in graph.steps]
        for step in graph.steps:
            for name in needs[step.name]:
                self.successors[indices[name]].append(indices[step.name])
        self.touching: dict[str, int] = {}
        for index, step in enumerate(graph.steps):
            for buffer in {*step.reads, *step.creates}:
                self.touching[buffer] = self.touching.get(buffer, 0) | 1 << index
        self.freed = [
            [buffer for buffer in {*step.reads, *step.creates} if buffer not in graph.kept | graph.given]
            for step in graph.steps
        ]
        self.created_bytes = [
            sum(graph.sizes_bytes[buffer] for buffer in step.creates if buffer not in graph.given)
            for step in graph.steps
        ]

    def find_best(self, max_states: int) -> Order | None:
        """Return the best order; `None` where more than `max_states` sets would be looked at."""
        start = self._run_free_steps(_State(0, 0, len(self.graph.steps), 0))
        queue, least = [start], {start.done: start.peak_bytes}
        while queue:
            state = heapq.heappop(queue)
            if state.num_left == 0:
                return Order(self._names(state), state.peak_bytes, is_optimal=True)
            if state.peak_bytes > least[state.done]:
                continue
            for index in self._ready(state.done):
                following = self._run_free_steps(self._run(state, index))
                if following.peak_bytes < least.get(following.done, following.peak_bytes + 1):
                    least[following.done] = following.peak_bytes
                    heapq.heappush(queue, following)
            if len(least) > max_states:
                return None
        raise ConfigError("the steps follow each other in a circle; no order is possible")

    def find_good(self, width: int) -> Order:
        """Return the best order among `width` kept at each length."""
        beam = [self._run_free_steps(_State(0, 0, len(self.graph.steps), 0))]
        while any(state.num_left for state in beam):
            following: dict[int, _State] = {}
            for state in beam:
                choices = [self._run_free_steps(self._run(state, index)) for index in self._ready(state.done)] or [
                    state
                ]
                for choice in choices:
                    if choice.done not in following or choice < following[choice.done]:
                        following[choice.done] = choice
            fewest = max(choice.num_left for choice in following.values())
            behind = [choice for choice in following.values() if choice.num_left == fewest]
            ahead = [choice for choice in following.values() if choice.num_left != fewest]
            beam = heapq.nsmallest(width, behind) + heapq.nsmallest(width, ahead)
        best = min(beam)
        return Order(self._names(best), best.peak_bytes, is_optimal=False)

    def _ready(self, done: int) -> list[int]:
        return [index for index, needs in enumerate(self.needs) if not done >> index & 1 and needs & done == needs]

    def _run(self, state: _State, index: int) -> _State:
        during = state.alive_bytes + self.created_bytes[index]
        done = state.done | 1 << index
        freed = sum(
            self.graph.sizes_bytes[buffer]
            for buffer in self.freed[index]
            if self.touching[buffer] & done == self.touching[buffer]
        )
        peak = max(state.peak_bytes, during + self.graph.steps[index].scratch_bytes)
        path = (index, state.path)
        return _State(peak, during - freed, state.num_left - 1, done, path)  # type: ignore[arg-type]

    def _run_free_steps(self, state: _State) -> _State:
        """Take every ready step that raises neither the peak nor what is alive."""
        waiting = self._ready(state.done)
        while waiting:
            taken = None
            for index in waiting:
                following = self._run(state, index)
                if following.peak_bytes == state.peak_bytes and following.alive_bytes <= state.alive_bytes:
                    taken, state = index, following
                    break
            if taken is None:
                break
            waiting.remove(taken)
            waiting += [
                successor
                for successor in self.successors[taken]
                if successor not in waiting and self.needs[successor] & state.done == self.needs[successor]
            ]
        return state

    def _names(self, state: _State) -> tuple[str, ...]:
        names, path = [], state.path
        while path is not None:
            index, path = path
            names.append(self.graph.steps[index].name)
        return tuple(reversed(names))
