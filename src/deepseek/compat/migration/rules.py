"""The rules of a migration, read from `rules.yaml` and checked; the checkers beside this file apply them.

A rule applies when its `since` lies above the source generation and not above the target.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from deepseek.compat.generations import FrameworkGeneration, find_generation
from deepseek.core.config import Config

Severity = Literal["error", "warning"]


class Rule(Config):
    """The fields of all kinds of rules."""

    id: str
    since: str
    severity: Severity
    """An error stops the code or changes results; a warning is deprecated or changes a default."""
    why: str
    fix: str
    source: str
    is_always: bool = False
    """Whether it applies between any two generations."""


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
    known_keys: tuple[str, ...] = ()
    """The keys that the section may hold; every other one is a finding."""
    before: str
    after: str


class PythonRule(Rule):
    """A name or a call in Python source."""

    name: str
    """The qualified name, wherever it was imported from under whatever alias."""
    also: tuple[str, ...] = ()
    """Other qualified names of the same thing, such as that of the module that defines it."""
    replace_with: str | None = None
    first_argument: str | None = None
    """Source of an argument that the new name takes before all others."""
    parameters: tuple[str, ...] = ()
    """The old parameters in their order, where it matters which of them a call gives."""
    num_positional: int | None = None
    """How many arguments stay positional; the others are given by name. All of them without it."""
    defaults: dict[str, str] = Field(default_factory=dict)
    """Old defaults that the new name does not have, and that a call without them has to name."""
    is_decorator: bool = False
    """Whether it is written as a decorator without brackets too, which has to become a call."""
    needs: tuple[str, ...] = ()
    """Parameters without which the new name means something else, so that a person has to look."""
    refuses: tuple[str, ...] = ()
    """Parameters that the new name does not take."""
    keyword: str | None = None
    keyword_to: str | None = None
    add_keyword: str | None = None
    add_value: str | None = None
    before: str
    after: str

    @property
    def changes_arguments(self) -> bool:
        """Whether calls under the new name take other arguments, so that a use that is no call needs a person."""
        return bool(self.first_argument or self.parameters)

    @property
    def names(self) -> tuple[str, ...]:
        """All qualified names that the rule is for."""
        return (self.name, *self.also)


class Markers(Config):
    """Top-level keys by which a config of ours is known."""

    sure: tuple[str, ...]
    likely: tuple[str, ...]


class MigrationRules(Config):
    """The whole data file."""

    markers: Markers
    config: tuple[ConfigRule, ...]
    python: tuple[PythonRule, ...]
    checkpoint: tuple[Rule, ...]

    @model_validator(mode="after")
    def _check(self) -> MigrationRules:
        names = [rule.id for rule in (*self.config, *self.python, *self.checkpoint)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rule {twice[0]!r} stands in the file twice; give each id once")
        for rule in (*self.config, *self.python, *self.checkpoint):
            find_generation(rule.since)
        return self

    def between(self, source: FrameworkGeneration | None, target: FrameworkGeneration) -> MigrationRules:
        """Return the rules that matter on the way from `source` (`None`: from any) to `target`."""
        floor = (0, 0) if source is None else source.version

        def matters(rule: Rule) -> bool:
            return rule.is_always or floor < find_generation(rule.since).version <= target.version

        return MigrationRules(
            markers=self.markers,
            config=tuple(filter(matters, self.config)),
            python=tuple(filter(matters, self.python)),
            checkpoint=tuple(filter(matters, self.checkpoint)),
        )


@functools.cache
def load_rules() -> MigrationRules:
    """Read and check all rules, once."""
    return MigrationRules.from_file(Path(__file__).with_name("rules.yaml"))
