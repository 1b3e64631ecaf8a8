"""Where control flow stood in the user's file, and what is said about it: errors, warnings, and the notes of a trace.

Every rewritten statement carries a `Site`. While a function is traced, operators call `note` and `refuse`, which run as
ordinary Python even inside the tracer: what they see goes into the `Trace` that is being recorded, and a refusal leaves
as `ControlFlowError` with the file, the line, the line itself and a hint.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._dynamo import exc

from deepseek.core.errors import PermanentError

CHANGES_OUTSIDE = "this changes something outside of the tensor condition that surrounds it, on one side only"
CHANGES_OUTSIDE_HINT = "assign to a local variable in the branch and make the change after it"


class ControlFlowError(PermanentError):
    """Python control flow on a tensor value that cannot become one graph."""

    def __init__(self, message: str, sites: tuple[Site, ...] = (), place: str = "") -> None:
        super().__init__(message)
        self.sites = sites  # where Python would have to decide instead
        self.place = place  # file and line of what no graph can hold


class StartOver(exc.UnspecializeRestartAnalysis, exc.ShortenTraceback):
    """Asks the tracer to trace the function again from where its graph began: Python decides at one more place."""

    def __init__(self, reason: str) -> None:
        exc.TorchDynamoException.__init__(self, reason)
        self.restart_reason = reason
        self.first_useful_frame = None


class GraphBreakWarning(UserWarning):
    """A place where one graph became two, because it could not be rewritten and `fullgraph=False` allows it."""


Function = TypeVar("Function", bound=Callable[..., Any])


def runs_while_tracing(function: Function) -> Function:
    """Mark a function on constants that the tracer runs as it is instead of tracing it."""
    marked: Function = torch.compiler.assume_constant_result(function)
    return marked


@dataclass(eq=False)
class Site:
    """One statement or expression of the user's: where it is, what it is, and which variables pass through it."""

    file: str
    line: int
    kind: str
    function: str = ""
    names: tuple[str, ...] | None = None
    """The variables that come out; none where the branches give the function's result, or a value."""
    stop: int | None = None
    """The index among `names` of the flag that ends a loop."""
    is_native: bool = False
    """Whether Python decides here; set once it is known not to be rewritable and fullgraph=False allows a break."""
    is_plain_counter: bool = False
    key: str = ""  # texts, since the tracer may take a number that it meets twice for a variable one
    place: str = ""

    def __post_init__(self) -> None:
        self.key = str(len(SITES))
        self.place = f"{self.file}:{self.line}"
        SITES[self.key] = self

    @property
    def text(self) -> str:
        return line_at(self.place)


@dataclass
class Trace:
    """A record of tracing: the sites that became graph control flow, and the breaks."""

    rewritten: list[Site] = field(default_factory=list)
    breaks: list[tuple[Site, str]] = field(default_factory=list)
    may_break: bool = False
    """Whether Python may decide where no graph can."""

    def break_at(self, error: ControlFlowError) -> bool:
        """Let Python decide at the sites of a refusal, where that is allowed and they are not Python's already."""
        sites = [site for site in error.sites if not site.is_native]
        if not self.may_break or not sites:
            return False
        for site in sites:
            site.is_native = True
        self.rewritten[:] = [site for site in self.rewritten if not site.is_native]
        self.breaks.append((_site_of(error), str(error)))
        return True


def _site_of(error: ControlFlowError) -> Site:
    """Return the site of a refusal: the statement that no graph can hold, which may stand inside the one that
    decides."""
    site = error.sites[-1]
    if error.place in ("", site.place):
        return site
    file, _, line = error.place.rpartition(":")
    return Site(file, int(line), site.kind, site.function)


SITES: dict[str, Site] = {}
MAX_NESTED = 4  # times that a condition may stand inside itself before it is a recursion
OWN_FILES = str(Path(__file__).parents[1])
_TRACES: list[Trace] = []
_AROUND: dict[str, Site] = {}  # depth -> what was entered there last


def line_at(place: str) -> str:
    """Return the text of the line at `file:line`."""
    file, _, line = place.rpartition(":")
    return linecache.getline(file, int(line)).strip()


@contextmanager
def recording(trace: Trace) -> Iterator[Trace]:
    """Collect the notes of every trace inside in `trace`."""
    _TRACES.append(trace)
    try:
        yield trace
    finally:
        _TRACES.remove(trace)


@runs_while_tracing
def note(key: str) -> bool:
    """Write down that the site `key` became graph control flow; runs while tracing."""
    for trace in _TRACES:
        if SITES[key] not in trace.rewritten:
            trace.rewritten.append(SITES[key])
    return True


@runs_while_tracing
def enter(key: str, depth: str) -> bool:
    """Note that the branches of the site `key` are traced next, below the tensor condition `depth`."""
    site = SITES[key]
    _AROUND[depth] = site
    if sum(around is site for around in _around(depth)) > MAX_NESTED:
        refuse(
            key,
            depth,
            "a function calls itself inside its own tensor condition, and no graph knows how often",
            "write the recursion as a while loop",
        )
    return True


_WRITES: list[str] = []  # the variables that were changed on copies


@runs_while_tracing
def note_write(name: str) -> bool:
    """Note that a change of the variable `name` is made on a copy."""
    _WRITES.append(name)
    return True


@runs_while_tracing
def has_written(names: tuple[str, ...], since: str) -> bool:
    """Return whether one of these variables was changed on a copy since there were so many changes."""
    return any(name in names for name in _WRITES[int(since) :])


@runs_while_tracing
def count_writes() -> str:
    """Return how many changes were made on copies so far, as a text."""
    return str(len(_WRITES))


def _around(depth: str) -> list[Site]:
    """Return the sites that were entered down to a depth, the outermost first."""
    return [_AROUND[entered] for entered in sorted(_AROUND) if entered <= depth]


@runs_while_tracing
def refuse(key: str, depth: str | None, seen: str, hint: str) -> bool:
    """Stop the trace: what stands at the site `key` cannot become graph control flow; runs while tracing.

    `depth` is that of the tensor conditions around it; none says that the site itself is the last that was entered.
    """
    raise give_up(make_refusal(key, depth, seen, hint))


@runs_while_tracing
def need_value() -> bool:
    """Note that Python needs the value of a number that the graph computes: the graph breaks, where it may."""
    if _TRACES and not _TRACES[-1].may_break:
        frame = last_own_frame(torch._guards.TracingContext.extract_stack())
        assert frame is not None
        place = f"{frame.filename}:{frame.lineno}"
        raise ControlFlowError(
            f"{place}: Python needs the value of a number that the graph computes; calculate with tensors, or let the"
            f" graph break there with fullgraph=False (in {frame.name}: `{line_at(place)}`)",
            place=place,
        )
    return True


def give_up(error: ControlFlowError) -> ControlFlowError | StartOver:
    """Return what to raise in a trace: the refusal, or, where graphs may break, the wish to trace again without it.

    The pieces before the graph that is traced have run, and must not run again.
    """
    is_broken = bool(_TRACES) and _TRACES[-1].break_at(error)
    return StartOver(str(error)) if is_broken else error


def make_refusal(key: str, depth: str | None, seen: str, hint: str, place: str = "") -> ControlFlowError:
    """Return the error for the site `key`, or for another `place` (file and line) inside of it."""
    site = SITES[key]
    if depth is None:
        depth = max((entered for entered, around in _AROUND.items() if around is site), default="")
    where = place or site.place
    message = f"{where}: {seen}; {hint} (in {site.function}: `{line_at(where)}`)"
    return ControlFlowError(message, (*_around(depth), site), where)


def find_refusal(error: BaseException | None) -> ControlFlowError | None:
    """Return the refusal that a tracer wrapped into an error of its own, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ControlFlowError):
            return error
        error = error.__cause__ or error.__context__
    return None


REASONS = {
    "assume_constant_result argument conversion failed": (
        "a function kept in functools.lru_cache, or in another wrapper without Python source, is called; call what it"
        " wraps, for example f.__wrapped__(x)"
    ),
    "Unsupported context manager": (
        "a context manager made outside of the function is entered; make it in the with statement"
    ),
    "Failed to convert args/kwargs to proxy": "Python needs the value of a number that the graph computes",
    "Failed to trace builtin operator": "Python needs a value that only the graph computes",
    "sort with non-constant keys": "a list of values that only the graph computes is sorted",
}
"""The tracer's words for what users do often -> ours."""


def explain_reason(error: BaseException) -> str:
    """Return in one sentence why a tracer failed, in our words where they tell more than its own."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if "data-dependent expression" in reason:
        return "Python needs a value that only the graph computes"
    return REASONS.get(reason, reason)


def last_own_frame(stack: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """Return the innermost frame of a stack that is neither torch's nor of these files."""
    own = [frame for frame in stack if not frame.filename.startswith(OWN_FILES) and "/torch/" not in frame.filename]
    return own[-1] if own else None
