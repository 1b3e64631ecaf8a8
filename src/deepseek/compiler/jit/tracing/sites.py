"""Where control flow stood in the user's file, and what is said about it: errors, warnings, and the notes of a trace.

Every rewritten statement carries a `Site`. While a function is traced, operators call `note` and `refuse`, which run as
ordinary Python even inside the tracer: what they see goes into the `Trace` that is being recorded, and a refusal leaves
as `ControlFlowError` with the file, the line, the line itself and a hint.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from deepseek.core.errors import PermanentError


class ControlFlowError(PermanentError):
    """Python control flow on a tensor value that cannot become one graph."""

    def __init__(self, message: str, sites: tuple[Site, ...] = ()) -> None:
        super().__init__(message)
        self.sites = sites  # where Python would have to decide instead


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
    is_native: bool = False  # set once it is known not to be rewritable and fullgraph=False allows a break
    is_plain_counter: bool = False
    key: str = ""  # texts, since the tracer may take a number that it meets twice for a variable one
    place: str = ""

    def __post_init__(self) -> None:
        self.key = str(len(SITES))
        self.place = f"{self.file}:{self.line}"
        SITES[self.key] = self

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.line).strip()


@dataclass
class Trace:
    """What the operators did while functions were traced: the sites that became graph control flow, and the breaks."""

    rewritten: list[Site] = field(default_factory=list)
    breaks: list[tuple[Site, str]] = field(default_factory=list)


SITES: dict[str, Site] = {}
MAX_NESTED = 4  # times that a condition may stand inside itself before it is a recursion
_TRACES: list[Trace] = []
_AROUND: dict[str, Site] = {}  # depth -> what was entered there last


@contextmanager
def recording(trace: Trace) -> Iterator[Trace]:
    """Notes of every trace inside go into `trace`."""
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
    """The branches of the site `key` are looked at now, below the tensor condition `depth`; runs while tracing."""
    site = SITES[key]
    _AROUND[depth] = site
    if sum(each is site for each in _around(depth)) > MAX_NESTED:
        refuse(
            key,
            depth,
            "a function calls itself inside its own tensor condition, and no graph knows how often",
            "write the recursion as a while loop",
        )
    return True


def _around(depth: str) -> list[Site]:
    """The sites that were entered down to a depth, the outermost first."""
    return [_AROUND[each] for each in sorted(_AROUND) if each <= depth]


@runs_while_tracing
def refuse(key: str, depth: str | None, seen: str, hint: str) -> bool:
    """Stop the trace: what stands at the site `key` cannot become graph control flow; runs while tracing.

    `depth` is that of the tensor conditions around it; none says that the site itself is the last that was entered.
    """
    site = SITES[key]
    if depth is None:
        depth = max((each for each, entered in _AROUND.items() if entered is site), default="")
    message = f"{site.place}: {seen}; {hint} (in {site.function}: `{site.text}`)"
    raise ControlFlowError(message, (*_around(depth), site))


def find_refusal(error: BaseException | None) -> ControlFlowError | None:
    """The refusal that a tracer wrapped into an error of its own, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ControlFlowError):
            return error
        error = error.__cause__ or error.__context__
    return None
