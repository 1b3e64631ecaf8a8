"""The config rules applied to one YAML, JSON or TOML text.

A file in a folder is judged only when its top level shows that it is a config of ours (`markers` of the rules, a
`ds_...` key, or an `apiVersion` of deepseek); a file that is named directly is always judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from deepseek.compat.generations import load_table
from deepseek.compat.migration.findings import Edit, Finding, Lines, find, unreadable
from deepseek.compat.migration.rules import ConfigRule, Markers, Rules
from deepseek.compat.migration.settings import Entry, SettingsError, read_entries


def check_config(text: str, path: str, suffix: str, rules: Rules, target: str, *, is_named: bool) -> list[Finding]:
    """The findings in one file; one that says `unreadable` when the text is not what its suffix says."""
    try:
        entries = read_entries(text, suffix)
    except SettingsError as error:
        return [unreadable(path, str(error), "mend or exclude the file", error.line, error.column)]
    if not (is_named or _is_ours(entries, text, rules.markers)):
        return []
    lines = Lines(text)
    findings = [found for rule in rules.config for found in _apply(rule, entries, text, path, suffix, target, lines)]
    return sorted(findings, key=lambda each: (each.line, each.column))


def _is_ours(entries: list[Entry], text: str, markers: Markers) -> bool:
    top = {each.path[0]: each for each in entries if len(each.path) == 1}
    if "apiVersion" in top and "deepseek." in _plain(top["apiVersion"], text):
        return True
    is_sure = any(name.startswith("ds_") or name in markers.sure for name in top)
    return is_sure or sum(name in markers.likely for name in top) >= 2


def _apply(
    rule: ConfigRule, entries: list[Entry], text: str, path: str, suffix: str, target: str, lines: Lines
) -> Iterator[Finding]:
    wanted = tuple(rule.key.split("."))
    for entry in entries:
        if entry.path != wanted:
            continue
        value = _plain(entry, text)
        match = re.fullmatch(rule.value, value) if rule.value else None
        if rule.value and match is None:
            continue
        if rule.id == "config-generation" and _same_generation(value, target):
            continue
        if rule.add_key:
            if any(each.path == (*wanted, rule.add_key) for each in entries):
                continue
            edits = _add(rule, entry, entries, text, suffix)
        else:
            edits = _replace(rule, entry, text, suffix, match, target)
        yield find(rule, path, *lines.line_and_column(entry.start), edits, ".".join(entry.path))


def _same_generation(value: str, target: str) -> bool:
    """Whether the value is a name of the target; one that is no generation at all is left to whoever reads it."""
    names = {name: row.name for row in load_table().generations for name in (row.name, *row.aliases)}
    return names.get(value.removeprefix("v"), target) == target


def _replace(
    rule: ConfigRule, entry: Entry, text: str, suffix: str, match: re.Match[str] | None, target: str
) -> list[Edit]:
    edits = []
    if rule.rename_to:
        edits.append(Edit(entry.start, entry.end, _like(text[entry.start : entry.end], rule.rename_to)))
    if rule.set_value and entry.value:
        value = rule.set_value.replace("{to}", f"v{target}")
        edits.append(Edit(*entry.value, _literal(match.expand(value) if match else value, suffix)))
    return edits


def _add(rule: ConfigRule, entry: Entry, entries: list[Entry], text: str, suffix: str) -> list[Edit]:
    """A new key before the first one of the section, written like it; nothing where the section is empty."""
    children = [each for each in entries if each.path[:-1] == entry.path and each.start > entry.start]
    if not children or text[children[0].start - 1] == "." or rule.add_key is None or rule.add_value is None:
        return []
    first = children[0].start
    indent = re.search(r"[^\r\n]*\Z", text[:first])
    before = indent[0] if indent else ""
    colon = " = " if suffix == ".toml" else ": "
    is_inline = suffix == ".json" or text[entry.end : first].count("{") > 0
    new = _like(text[first : children[0].end], rule.add_key) + colon + _literal(rule.add_value, suffix)
    new += "," if is_inline else ""
    newline = "\r\n" if "\r\n" in text else "\n"
    return [Edit(first, first, new + (newline + before if not before.strip() else " "))]


def _plain(entry: Entry, text: str) -> str:
    """The value without quotes and in lower case; empty for sections."""
    return text[slice(*entry.value)].strip().strip("\"'").lower() if entry.value else ""


def _like(old: str, new: str) -> str:
    """`new` in the quotes that `old` wears."""
    return old[0] + new + old[0] if old[:1] in ("'", '"') else new


def _literal(value: str, suffix: str) -> str:
    return value if suffix in (".yaml", ".yml") else json.dumps(value)
