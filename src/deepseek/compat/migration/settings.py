"""Keys and values of YAML, JSON and TOML files with their exact places in the text.

`read_entries(text, suffix)` gives every key that is reached through mappings from the top, so that a rule can point at
a line and an edit can replace just those characters, comments and layout untouched. YAML and JSON go through libyaml,
which marks every node. No TOML library tells positions, so a TOML text that `tomllib` accepts is walked here once more.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import yaml

from deepseek.core.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json", ".toml")
# libyaml recurses in C; deeper files go through the Python parser, which ends in an error instead of the process.
_MAX_C_DEPTH = 1000


@dataclass(frozen=True)
class Entry:
    """One key; offsets count characters of the text."""

    path: tuple[str, ...]
    start: int
    end: int
    value: tuple[int, int] | None
    """Where a single value stands; `None` for sections and lists."""


class SettingsError(ConfigError):
    """The text is not what its suffix says; carries the place."""

    def __init__(self, message: str, line: int = 1, column: int = 1) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


def read_entries(text: str, suffix: str) -> list[Entry]:
    """All keys in order. Raises `SettingsError` for a text that is not valid or nested too deeply."""
    try:
        if suffix == ".toml":
            tomllib.loads(text)
            return list(_walk_toml(text))
        if suffix == ".json":
            json.loads(text)
            # Tabs are no indentation in YAML; in valid JSON they stand between values only.
            return _walk_yaml(text.replace("\t", " "), yaml.CSafeLoader)
        return _walk_yaml(text, yaml.CSafeLoader if _yaml_depth(text) < _MAX_C_DEPTH else yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise SettingsError(f"not valid YAML: {error.problem or error.context}", *place) from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"not valid JSON: {error.msg}", error.lineno, error.colno) from error
    except tomllib.TOMLDecodeError as error:
        line, column = (int(each) for each in re.findall(r"\d+", str(error).rpartition("(at ")[2]) or ("1", "1"))
        raise SettingsError(f"not valid TOML: {error}", line, column) from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"not valid {suffix[1:].upper()}: {error}") from error
    except RecursionError as error:
        raise SettingsError("nested too deeply to be a config") from error


def _yaml_depth(text: str) -> int:
    """No less than the nesting of the text: one level takes a bracket, or a column of some line."""
    return max(text.count("[") + text.count("{"), max(map(len, text.splitlines()), default=0))


def _walk_yaml(text: str, loader: type[yaml.CSafeLoader | yaml.SafeLoader]) -> list[Entry]:
    reader = loader(text)
    entries: list[Entry] = []
    # An anchored section can be referred to many times; it is walked once, where it stands.
    seen: set[int] = set()
    while reader.check_node():
        pending: list[tuple[tuple[str, ...], yaml.Node | None]] = [((), reader.get_node())]
        while pending:
            path, node = pending.pop()
            if id(node) in seen or not isinstance(node, yaml.MappingNode):
                continue
            seen.add(id(node))
            for key, value in node.value:
                here = (*path, str(key.value))
                span = None
                if isinstance(value, yaml.ScalarNode) and value.start_mark.index >= key.end_mark.index:
                    span = (value.start_mark.index, value.end_mark.index)
                entries.append(Entry(here, key.start_mark.index, key.end_mark.index, span))
                pending.append((here, value))
    return sorted(entries, key=lambda each: each.start)


_TOML_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*'""")
_TOML_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_TOML_VALUE = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}' + r"|'''.*?'{3,5}" + r"""|"(?:[^"\\]|\\.)*"|'[^']*'|[^,\]}\s#]+(?: [0-9][0-9:.]*)?""",
    re.DOTALL,
)


def _walk_toml(text: str) -> Iterator[Entry]:
    """The keys of a text that `tomllib` has accepted, so that nothing needs to be checked again."""
    section: tuple[str, ...] = ()
    at = _skip(text, 0)
    while at < len(text):
        if text[at] == "[":
            opening = 2 if text.startswith("[[", at) else 1
            parts, at = _toml_keys(text, at + opening)
            section = tuple(name for name, _, _ in parts)
            yield from (Entry(section[: each + 1], start, end, None) for each, (_, start, end) in enumerate(parts))
            at = _skip(text, text.index("]", at) + opening)
        else:
            at = yield from _walk_assignment(text, at, section)
            at = _skip(text, at)


def _walk_assignment(text: str, at: int, section: tuple[str, ...]) -> Generator[Entry, None, int]:
    parts, at = _toml_keys(text, at)
    path = section
    for name, start, end in parts[:-1]:
        path = (*path, name)
        yield Entry(path, start, end, None)
    name, start, end = parts[-1]
    path = (*path, name)
    at = _skip(text, text.index("=", at) + 1)
    stop = at if text[at] in "[{" else _scalar_end(text, at)
    yield Entry(path, start, end, None if stop == at else (at, stop))
    return (yield from _walk_value(text, at, path))


def _walk_value(text: str, at: int, path: tuple[str, ...] | None) -> Generator[Entry, None, int]:
    """Past one value; keys of inline tables are told, those inside lists are not (`path` is `None` there)."""
    if text[at] == "{":
        at = _skip(text, at + 1)
        while text[at] != "}":
            if path is None:
                at = _toml_keys(text, at)[1]
                at = yield from _walk_value(text, _skip(text, text.index("=", at) + 1), None)
            else:
                at = yield from _walk_assignment(text, at, path)
            at = _skip(text, at)
            at = _skip(text, at + 1) if text[at] == "," else at
        return at + 1
    if text[at] == "[":
        at = _skip(text, at + 1)
        while text[at] != "]":
            at = yield from _walk_value(text, at, None)
            at = _skip(text, at)
            at = _skip(text, at + 1) if text[at] == "," else at
        return at + 1
    return _scalar_end(text, at)


def _scalar_end(text: str, at: int) -> int:
    match = _TOML_VALUE.match(text, at)
    assert match is not None
    return match.end()


def _toml_keys(text: str, at: int) -> tuple[list[tuple[str, int, int]], int]:
    """The parts of a dotted key with their places, and where it ends."""
    parts = []
    while True:
        at = _skip(text, at)
        match = _TOML_KEY.match(text, at)
        assert match is not None
        parts.append((_toml_name(match[0]), match.start(), match.end()))
        at = _skip(text, match.end())
        if text[at] != ".":
            return parts, at
        at += 1


def _toml_name(key: str) -> str:
    return next(iter(tomllib.loads(f"{key} = 0")))


def _skip(text: str, at: int) -> int:
    match = _TOML_SPACE.match(text, at)
    assert match is not None
    return match.end()
