"""The rules of a migration, read from `rules.yaml` and checked; the checkers beside this file apply them.

A rule applies when its `since` lies above the generation one comes from and not above the one one goes to.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from deepseek.compat.generations import Generation, find_generation
from deepseek.core.config import Config

Severity = Literal["error", "warning"]


class Rule(Config):
    """What all kinds of rules have."""

    id: str
    since: str
    severity: Severity
    """An error stops the code or changes results; a warning is deprecated or changes a default."""
    why: str
    fix: str
    source: str
    is_always: bool = False
    """Whether it applies whichever generations one comes from and goes to."""


class ConfigRule(Rule):
    """A setting in a YAML, JSON or TOML file."""

    key: str
    """Dotted path from the top of the file."""
    value: str | None = None
    """Regular expression that the value must match, without quotes and in lower case."""
    rename_to: str | None = None
    set_value: str | None = None
    add_key: str | None = None
    """A key that the section must hold."""
    add_value: str | None = None
    before: str
    after: str


class PythonRule(Rule):
    """A name or a call in Python source."""

    name: str
    """The qualified name, wherever it was imported from under whatever alias."""
    replace_with: str | None = None
    first_argument: str | None = None
    """Source of an argument that the new name takes before all others."""
    keyword: str | None = None
    keyword_to: str | None = None
    add_keyword: str | None = None
    add_value: str | None = None
    before: str
    after: str


class Markers(Config):
    """Top-level keys by which a config of ours is known."""

    sure: tuple[str, ...]
    likely: tuple[str, ...]


class Rules(Config):
    """The whole data file."""

    markers: Markers
    config: tuple[ConfigRule, ...]
    python: tuple[PythonRule, ...]
    checkpoint: tuple[Rule, ...]

    @model_validator(mode="after")
    def _check(self) -> Rules:
        names = [rule.id for rule in (*self.config, *self.python, *self.checkpoint)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rule {twice[0]!r} stands in the file twice; give each id once")
        for rule in (*self.config, *self.python, *self.checkpoint):
            find_generation(rule.since)
        return self

    def between(self, source: Generation | None, target: Generation) -> Rules:
        """The rules that matter on the way from `source` (`None`: from any) to `target`."""
        floor = (0, 0) if source is None else source.version

        def matters(rule: Rule) -> bool:
            return rule.is_always or floor < find_generation(rule.since).version <= target.version

        return Rules(
            markers=self.markers,
            config=tuple(filter(matters, self.config)),
            python=tuple(filter(matters, self.python)),
            checkpoint=tuple(filter(matters, self.checkpoint)),
        )


@functools.cache
def load_rules() -> Rules:
    """All rules, read and checked once."""
    return Rules.from_file(Path(__file__).with_name("rules.yaml"))
