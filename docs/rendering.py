"""The table of generations and the list of migration rules as pages of `docs/reference/`.

`docs/generate.py` (`make docs`) writes both pages; a test compares them with the data, so that a page cannot say what
the data does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepseek.compat.generations import FrameworkGeneration, Table
from deepseek.compat.migration.rules import ConfigRule, MigrationRules, PythonRule
from deepseek.core.config import Config

_NOTE = "<!-- Rendered by `make docs`; edit the data file, not this page. -->"


def render_generations(table: Table) -> str:
    """The page "Generations": an overview, then one section for each, then the rules that choose."""
    parts = [
        "# Generations",
        _NOTE,
        "A generation is a version of the engine that this product was built from: a named set of capabilities with a "
        "config schema and a checkpoint layout. It is no version of this product, which reads and reproduces all of "
        "them. The documents tell several histories; this is their union. Choose one with `deepseek advise`.",
        "Each statement ends in the mark of its document:",
        _table(["mark", "document"], [[f"[{mark}]", what] for mark, what in table.documents.items()]),
        _table(
            ["generation", "also called", "status", "precisions", "distribution"],
            [
                [
                    g.name,
                    ", ".join(g.aliases),
                    g.status,
                    ", ".join(g.capabilities.precisions),
                    g.capabilities.distribution,
                ]
                for g in table.generations
            ],
        ),
        *(_section(each) for each in table.generations),
        "## Choosing",
        "The first row whose conditions hold, and whose generation no exclusion names, decides.",
        _table(
            ["rule", "if", "generation", "because"],
            [[r.id, _conditions(r.conditions), r.recommend, r.because] for r in table.selection],
        ),
        _table(
            ["exclusion", "if", "rules out", "because"],
            [[r.id, _conditions(r.conditions), ", ".join(r.excludes), r.because] for r in table.exclusions],
        ),
        "## Upgrading",
        _table(["from", "to", "advice"], [[u.source, u.target, u.advice] for u in table.upgrades]),
        "## Known to fail",
        _table(
            ["generation", "CUDA", "driver below", "symptom", "what to do"],
            [[k.generation, k.cuda, k.driver_below, k.symptom, k.fix] for k in table.known_bad],
        ),
        "## Settings in config files",
        _bullets(table.config_notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_rules(rules: MigrationRules) -> str:
    """The page "Migration rules": one section for each, with its example."""
    parts = [
        "# Migration rules",
        _NOTE,
        "What `deepseek-migrate --check` finds on the way to a [generation](generations.md), whose page names the "
        "documents D0 to D4; `house` is a decision of this project. A rule applies on the way to its generation or a "
        "later one; an error stops the code or changes results, a warning is deprecated or changes a default.",
    ]
    for rule in (*rules.config, *rules.python, *rules.checkpoint):
        parts.append(f"## {rule.id}")
        parts.append(f"Since {rule.since}, {rule.severity}, from {rule.source}: {rule.why}. To do: {rule.fix}.")
        if isinstance(rule, ConfigRule | PythonRule):
            language = "yaml" if isinstance(rule, ConfigRule) else "python"
            parts += [f"```{language}\n# before\n{rule.before}# after\n{rule.after}```"]
    return "\n\n".join(parts) + "\n"


def _section(generation: FrameworkGeneration) -> str:
    parts = [f"## {generation.name}"]
    for title in ("when", "brought", "costs", "audience", "advice"):
        claims = getattr(generation, title)
        parts += [f"**{title.capitalize()}**\n\n{_bullets(claims)}"] if claims else []
    parts.append(f"**Model families** {', '.join(generation.capabilities.model_families)}")
    parts.append(f"**Features**\n\n{_bullets(generation.capabilities.features)}")
    parts += _settings("Requirements", generation.requirements)
    if generation.measurements:
        parts.append(
            _table(
                ["measured", "latency (ms)", "images/s", "accuracy loss (%)", "memory (GB)", "document"],
                [list(each.to_dict().values()) for each in generation.measurements],
            )
        )
    if generation.config_keys:
        parts.append("**Config keys** " + ", ".join(f"`{key}`" for key in generation.config_keys))
    parts += _settings("Checkpoint layout", generation.layout) + _settings("Profile", generation.profile)
    return "\n\n".join(parts)


def _settings(title: str, config: Config | None) -> list[str]:
    values = config.to_dict() if config else {}
    lines = [f"- {key}: {_plain(value)}" for key, value in values.items() if value not in (None, [], False)]
    return [f"**{title}**\n\n" + "\n".join(lines)] if lines else []


def _conditions(config: Config) -> str:
    given = {key: value for key, value in config.to_dict().items() if value is not None}
    return ", ".join(f"{key} {_plain(value)}" for key, value in given.items()) or "always"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bullets(claims: Iterable[object]) -> str:
    return "\n".join(f"- {each}" for each in claims)


def _table(header: list[str], rows: Iterable[list[Any]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)
