"""The config rules applied to one YAML, JSON or TOML text.

A file in a folder is judged only when its top level shows that it is a config of ours (`markers` of the rules, a
`ds_...` key, or an `apiVersion` of deepseek); a file that is named directly is always judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import yaml

from deepseek.compat.generations import find_generation
from deepseek.compat.migration.findings import Edit, Finding, Lines, apply_edits, find, unreadable
from deepseek.compat.migration.rules import ConfigRule, Markers, MigrationRules
from deepseek.compat.migration.settings import Entry, SettingsError, read_entries, read_values
from deepseek.core.errors import ConfigError


def check_config(
    text: str, path: str, suffix: str, rules: MigrationRules, target: str, *, is_named: bool
) -> list[Finding]:
    """Return the findings in one file; one that says `unreadable` when the text is not what its suffix says.

    Edits are kept where the edited text reads as the same values, changed as the rules say and in nothing else.
    """
    try:
        entries = read_entries(text, suffix)
    except SettingsError as error:
        return [unreadable(path, str(error), "mend or exclude the file", error.line, error.column)]
    documents = sorted({entry.document for entry in entries})
    source = _ConfigText(text, suffix, path, target)
    findings: list[tuple[Finding, _Change | None]] = []
    for document in documents:
        own = [entry for entry in entries if entry.document == document]
        if is_named or _is_ours(own, rules.markers):
            findings += [found for rule in rules.config for found in _apply(rule, own, source)]
    findings.sort(key=lambda pair: (pair[0].line, pair[0].column))
    return _keep_verified(findings, source)


@dataclass(frozen=True)
class _ConfigText:
    """One text to judge."""

    text: str
    suffix: str
    path: str
    target: str

    @cached_property
    def lines(self) -> Lines:
        """Where the lines begin."""
        return Lines(self.text)


@dataclass(frozen=True)
class _Change:
    """The effect of an edit on the values of a file: a key gets another name, a value, or a first child."""

    document: int
    path: tuple[str, ...]
    rename_to: str | None = None
    value: str | None = None
    added: tuple[str, str] | None = None

    def apply_(self, documents: list[object]) -> None:
        """Make the change in place."""
        section = documents[self.document]
        *parents, key = self.path
        for name in parents:
            section = section[name] if isinstance(section, dict) else None
        if not isinstance(section, dict) or key not in section:
            return
        if self.added is not None:
            section[key][self.added[0]] = self.added[1]
            return
        value = section.pop(key)
        section[self.rename_to or key] = value if self.value is None else self.value


def _is_ours(entries: list[Entry], markers: Markers) -> bool:
    top = {entry.path[0]: entry for entry in entries if len(entry.path) == 1}
    if "apiVersion" in top and "deepseek." in top["apiVersion"].plain:
        return True
    is_sure = any(name.startswith("ds_") or name in markers.sure for name in top)
    return is_sure or sum(name in markers.likely for name in top) >= 2


def _apply(rule: ConfigRule, entries: list[Entry], source: _ConfigText) -> Iterator[tuple[Finding, _Change | None]]:
    wanted = tuple(rule.key.split("."))
    matching = [entry for entry in entries if entry.path == wanted]
    for entry in matching:
        match = re.fullmatch(rule.value, entry.plain) if rule.value else None
        if rule.value and match is None:
            continue
        if rule.id in ("config-generation", "config-version") and not _is_older(entry.plain, source.target):
            continue
        if rule.known_keys:
            yield from ((found, None) for found in _find_unknown_keys(rule, entry, entries, source))
            continue
        if rule.add_key and any(other.path == (*wanted, rule.add_key) for other in entries):
            continue
        edits, change = _add(rule, entry, entries, source) if rule.add_key else _replace(rule, entry, source, match)
        # With a second key of that name, or one of the new name, only a person can say which of the two is meant.
        new_path = (*wanted[:-1], rule.rename_to or "")
        # The headers of TOML say the name of a section as often as it has parts.
        are_headers = source.suffix == ".toml" and all(other.value is None for other in matching)
        reason = None
        if any(other.path == new_path for other in entries):
            reason = f"{'.'.join(new_path)} stands there, too"
        elif not are_headers and len(matching) > 1:
            reason = f"{rule.key} stands there twice"
        elif _is_read_elsewhere(entry, source.text):
            reason = "an anchor, a merge or a tag is in the way"
        found = find(rule, source.path, *source.lines.line_and_column(entry.start), edits, ".".join(entry.path))
        if edits and reason:
            found = found.for_person(reason)
        yield found, change if found.edits else None


def _find_unknown_keys(
    rule: ConfigRule, section: Entry, entries: list[Entry], source: _ConfigText
) -> Iterator[Finding]:
    """Yield the keys of a section that no generation has there."""
    for entry in entries:
        if entry.path[:-1] == section.path and entry.path[-1] not in rule.known_keys:
            at = source.lines.line_and_column(entry.start)
            yield find(rule, source.path, *at, detail=f"{'.'.join(entry.path)}; known: {', '.join(rule.known_keys)}")


def _is_read_elsewhere(entry: Entry, text: str) -> bool:
    """Whether other keys read the same text, or the value carries an anchor or a tag that an edit would lose."""
    value = text[slice(*entry.value)] if entry.value else ""
    return entry.is_shared or value[:1] in ("&", "*", "!")


def _is_older(value: str, target: str) -> bool:
    """Whether a value names an older generation; one that is no generation at all is left to its reader."""
    try:
        return find_generation(value).version < find_generation(target).version
    except ConfigError:
        return False


def _replace(
    rule: ConfigRule, entry: Entry, source: _ConfigText, match: re.Match[str] | None
) -> tuple[list[Edit], _Change]:
    edits, value = [], None
    if rule.rename_to:
        edits.append(Edit(entry.start, entry.end, _in_quotes_of(source.text[entry.start : entry.end], rule.rename_to)))
    if rule.set_value and entry.value:
        value = rule.set_value.replace("{to}", f"v{source.target}")
        value = match.expand(value) if match else value
        edits.append(Edit(*entry.value, _literal(value, source.suffix)))
    return edits, _Change(entry.document, entry.path, rule.rename_to, value)


def _add(
    rule: ConfigRule, entry: Entry, entries: list[Entry], source: _ConfigText
) -> tuple[list[Edit], _Change | None]:
    """Return the edit that puts a key before the first one of the section; none where the section is empty."""
    text, suffix = source.text, source.suffix
    children = [other for other in entries if other.path[:-1] == entry.path and other.start > entry.start]
    if not children or text[children[0].start - 1] == "." or rule.add_key is None or rule.add_value is None:
        return [], None
    first = children[0].start
    indent = re.search(r"[^\r\n]*\Z", text[:first])
    before = indent[0] if indent else ""
    colon = " = " if suffix == ".toml" else ": "
    is_inline = suffix == ".json" or entry.is_inline
    new = _in_quotes_of(text[first : children[0].end], rule.add_key) + colon + _literal(rule.add_value, suffix)
    new += "," if is_inline else ""
    newline = "\r\n" if "\r\n" in text else "\n"
    edit = Edit(first, first, new + (newline + before if not before.strip() else " "))
    return [edit], _Change(entry.document, entry.path, added=(rule.add_key, rule.add_value))


def _in_quotes_of(old: str, new: str) -> str:
    """Return `new` in the quotes of `old`."""
    return old[0] + new + old[0] if old[:1] in ("'", '"') else new


def _literal(value: str, suffix: str) -> str:
    return value if suffix in (".yaml", ".yml") else json.dumps(value)


# --- Verification ---


def _keep_verified(findings: list[tuple[Finding, _Change | None]], source: _ConfigText) -> list[Finding]:
    """Take the edits away that do not do exactly what they are for, as the file's own library reads the result."""
    edited = [(finding, change) for finding, change in findings if change is not None]
    if edited and not _is_right(edited, source):
        kept: list[tuple[Finding, _Change]] = []
        for pair in edited:
            kept += [pair] if _is_right([*kept, pair], source) else []
        edited = kept
    verified = [finding for finding, _ in edited]
    reason = "the edited file would not read as the rule says"
    return [found if not found.edits or found in verified else found.for_person(reason) for found, _ in findings]


def _is_right(edited: Sequence[tuple[Finding, _Change]], source: _ConfigText) -> bool:
    new = apply_edits(source.text, [finding for finding, _ in edited])
    try:
        expected, read = read_values(source.text, source.suffix), read_values(new, source.suffix)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return False
    # Sections are renamed last, since the changes inside them go by the old names.
    for _, change in sorted(edited, key=lambda pair: -len(pair[1].path)):
        change.apply_(expected)
    try:
        return _canonical(expected) == _canonical(read)
    except RecursionError:  # a section that holds itself
        return False


def _canonical(value: object) -> str:
    """Return a text that is the same for equal values, whatever the order of keys, with `nan` equal to itself."""
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{key!r}: {_canonical(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_canonical, value)) + "]"
    return repr(value)
