"""The findings of a scan, and the changes to the text that settle them."""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek.compat.migration.rules import Rule, Severity


@dataclass(frozen=True, order=True)
class Edit:
    """Characters `start` to `end` of a text become `replacement`."""

    start: int
    end: int
    replacement: str


@dataclass(frozen=True)
class Finding:
    """One position that has to change, or a file that could not be read (`rule` is then `unreadable`)."""

    path: str
    line: int
    column: int
    rule: str
    severity: Severity
    why: str
    fix: str
    edits: tuple[Edit, ...] = ()
    is_for_person: bool = False
    """Whether `--apply` leaves it, although its rule can settle others."""

    @property
    def is_unreadable(self) -> bool:
        """Whether the file itself could not be read."""
        return self.rule == UNREADABLE

    @property
    def is_fixable(self) -> bool:
        """Whether `--apply` settles it: by an edit, or by converting the file.

        A pickle is converted where it holds nothing but tensors, which only loading it shows.
        """
        is_converted = self.rule in ("checkpoint-layout", "checkpoint-pickle") and not self.is_for_person
        return bool(self.edits) or is_converted

    def with_edits(self, edits: Iterable[Edit]) -> Finding:
        """Return the same finding with other edits."""
        return dataclasses.replace(self, edits=tuple(edits))

    @property
    def is_conditional(self) -> bool:
        """Whether `--apply` may find that it cannot settle it."""
        return self.rule == "checkpoint-pickle" and self.is_fixable

    def for_person(self, reason: str, fix: str | None = None) -> Finding:
        """Return the same finding, left to a person for a reason; `fix` says what to do if the rule says `--apply`."""
        why = f"{self.why} ({reason})"
        return dataclasses.replace(self, edits=(), is_for_person=True, why=why, fix=fix or self.fix)

    def moved(self, line: int, detail: str) -> Finding:
        """Return the same finding at another line, without edits."""
        return dataclasses.replace(self, line=line, edits=(), why=f"{self.why} ({detail})")

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {self.severity} {self.rule}: {self.why}; {self.fix}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `is_fixable` says whether `--apply` settles it."""
        names = ("path", "line", "column", "rule", "severity", "why", "fix")
        return {name: getattr(self, name) for name in names} | {"is_fixable": self.is_fixable}


UNREADABLE = "unreadable"


def unreadable(path: str, why: str, fix: str, line: int = 1, column: int = 1) -> Finding:
    """Make the finding for a file that cannot be checked."""
    return Finding(path, line, column, UNREADABLE, "error", why, fix)


def find(rule: Rule, path: str, line: int, column: int, edits: Iterable[Edit] = (), detail: str = "") -> Finding:
    """Make the finding of a rule at a position; `detail` says what was seen there."""
    why = f"{rule.why} ({detail})" if detail else rule.why
    return Finding(path, line, column, rule.id, rule.severity, why, rule.fix, tuple(edits))


def choose_edits(findings: Iterable[Finding]) -> list[Edit]:
    """List the edits of all findings, in order; a finding whose edits would touch another's is left out."""
    accepted: set[Edit] = set()
    for finding in findings:
        new = set(finding.edits) - accepted
        if not any(one.start < other.end and other.start < one.end for one in new for other in accepted):
            accepted |= new
    return sorted(accepted)


def apply_edits(text: str, findings: Iterable[Finding]) -> str:
    """Apply the edits of all findings to `text`."""
    return apply_edits_at(text, choose_edits(findings))


def apply_edits_at(text: str, edits: Sequence[Edit], start: int = 0) -> str:
    """Apply edits, in order, to a text that begins at the offset `start` of the whole."""
    for edit in reversed(edits):
        text = text[: edit.start - start] + edit.replacement + text[edit.end - start :]
    return text


class Lines:
    """Starts of lines: from (line, column) to an offset and back; lines count from 1."""

    def __init__(self, text: str) -> None:
        self.starts = [0, *(match.end() for match in re.finditer(r"\r\n|\r|\n", text))]

    def offset(self, line: int, column: int) -> int:
        """Return the offset of a position whose column counts from 0."""
        return self.starts[line - 1] + column

    def line_and_column(self, offset: int) -> tuple[int, int]:
        """Return line and column of an offset, both counting from 1."""
        line = bisect.bisect_right(self.starts, offset)
        return line, offset - self.starts[line - 1] + 1
