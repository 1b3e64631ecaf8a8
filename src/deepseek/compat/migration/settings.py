"""Keys and values of YAML, JSON and TOML files with their exact places in the text.

`read_entries(text, suffix)` gives every key that is reached through mappings from the top, so that a rule can point at
a line and an edit can replace just those characters, comments and layout untouched. YAML goes through libyaml, which
marks every node. No library for JSON and TOML tells positions, so a text that `json` or `tomllib` accepts is walked
here once more. (JSON is not quite YAML: long keys, surrogates and control characters are fine in one of them only.)
"""

from __future__ import annotations

import codecs
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
# Aliases of aliases multiply; no config has so many values.
_MAX_VALUES = 1_000_000


@dataclass(frozen=True)
class Entry:
    """One key; offsets count characters of the text."""

    path: tuple[str, ...]
    start: int
    end: int
    value: tuple[int, int] | None
    """Where a single value stands; `None` for sections and lists."""
    plain: str = ""
    """The value as its library reads it, in lower case: `yes` of YAML is `true`; empty for sections."""
    document: int = 0
    """Which document of a YAML stream it belongs to."""
    is_shared: bool = False
    """Whether other keys read the same text, through an alias or a merge, so that no edit can be for this one alone."""
    is_inline: bool = False
    """Whether it is a section inside braces."""


class SettingsError(ConfigError):
    """The text is not what its suffix says; carries the place."""

    def __init__(self, message: str, line: int = 1, column: int = 1) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


@dataclass(frozen=True)
class DecodedText:
    """A text, and how its file encodes it."""

    text: str
    encoding: str
    mark: bytes = b""

    def encode(self, text: str) -> bytes:
        """Encode another text as the file was."""
        return self.mark + text.encode(self.encoding)


def decode_settings(content: bytes) -> DecodedText:
    """Decode a file by its byte order mark, as UTF-8 without one. Raises `UnicodeDecodeError`."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if content.startswith(mark):
            return DecodedText(content[len(mark) :].decode(encoding), encoding, mark)
    return DecodedText(content.decode("utf-8"), "utf-8")


def read_entries(text: str, suffix: str) -> list[Entry]:
    """Return all keys in order. Raises `SettingsError` for a text that is not valid or nested too deeply."""
    try:
        if suffix == ".toml":
            tomllib.loads(text)
            return list(_walk_toml(text))
        if suffix == ".json":
            json.loads(text)
            return list(_walk_json(text))
        return _walk_yaml(text, yaml.CSafeLoader if _yaml_depth(text) < _MAX_C_DEPTH else yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise SettingsError(f"not valid YAML: {error.problem or error.context}", *place) from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"not valid JSON: {error.msg}", error.lineno, error.colno) from error
    except tomllib.TOMLDecodeError as error:
        line, column = (int(number) for number in re.findall(r"\d+", str(error).rpartition("(at ")[2]) or ("1", "1"))
        raise SettingsError(f"not valid TOML: {error}", line, column) from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"not valid {suffix[1:].upper()}: {error}") from error
    except RecursionError as error:
        raise SettingsError("nested too deeply to be a config") from error


def read_values(text: str, suffix: str) -> list[object]:
    """Read the documents of a text that `read_entries` has accepted, as their libraries give them.

    Raises `ValueError` where aliases of aliases multiply beyond what could be compared.
    """
    if suffix == ".toml":
        return [tomllib.loads(text)]
    if suffix == ".json":
        return [json.loads(text)]
    for root in yaml.compose_all(text, _TextLoader):
        if _count_values(root) > _MAX_VALUES:
            raise ValueError(f"its aliases stand for more than {_MAX_VALUES} values")
    return list(yaml.load_all(text, _TextLoader))


class _TextLoader(yaml.CSafeLoader):
    """Reads values of unknown tags as their plain text."""


def _construct_plainly(loader: _TextLoader, _: str, node: yaml.Node) -> object:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value


_TextLoader.add_multi_constructor("", _construct_plainly)


def _yaml_depth(text: str) -> int:
    """No less than the nesting of the text: one level takes a bracket, or a column of some line."""
    return max(text.count("[") + text.count("{"), max(map(len, text.splitlines()), default=0))


def _walk_yaml(text: str, loader: type[yaml.CSafeLoader | yaml.SafeLoader]) -> list[Entry]:
    reader = loader(text)
    entries: list[Entry] = []
    document = 0
    while reader.check_node():
        root = reader.get_node()
        shared = _shared_nodes(root)
        # An anchored section can be referred to many times. It is walked where it stands, and wherever else a rule can
        # reach: from the top of the file, and through a merge into it.
        walked: set[int] = set()
        walked_as: set[tuple[int, tuple[str, ...]]] = set()
        pending: list[tuple[tuple[str, ...], yaml.Node | None, bool]] = [((), root, False)]
        while pending:
            path, node, is_shared = pending.pop()
            is_known = (id(node), path) in walked_as or (len(path) > 1 and id(node) in walked)
            if not isinstance(node, yaml.MappingNode) or is_known:
                continue
            walked.add(id(node))
            walked_as.add((id(node), path))
            is_shared = is_shared or id(node) in shared
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    pending += [(path, base, True) for base in merged] if len(path) <= 1 else []
                here = (*path, str(key.value))
                entries.append(_make_entry(here, key, value, document, is_shared=is_shared or id(value) in shared))
                pending.append((here, value, is_shared))
        document += 1
    return sorted(entries, key=lambda entry: entry.start)


def _count_values(root: yaml.Node | None) -> int:
    """Return how many nodes a document holds with every alias written out; a node inside itself counts once."""
    counts: dict[int, int] = {}
    pending = [] if root is None else [root]
    while pending:
        node = pending[-1]
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inside = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        if id(node) not in counts:
            counts[id(node)] = 1
            pending += [child for child in inside if id(child) not in counts]
        else:
            pending.pop()
            counts[id(node)] = 1 + sum(counts[id(child)] for child in inside)
    return counts[id(root)] if root is not None else 0


def _make_entry(path: tuple[str, ...], key: yaml.Node, value: yaml.Node, document: int, *, is_shared: bool) -> Entry:
    span, plain = None, ""
    if isinstance(value, yaml.ScalarNode) and value.start_mark.index >= key.end_mark.index:
        span = (value.start_mark.index, value.end_mark.index)
    if isinstance(value, yaml.ScalarNode):
        plain = str(value.value).strip().lower()
        if value.tag == "tag:yaml.org,2002:bool":
            plain = "true" if yaml.SafeLoader.bool_values[plain] else "false"
    is_inline = isinstance(value, yaml.MappingNode) and bool(value.flow_style)
    return Entry(path, key.start_mark.index, key.end_mark.index, span, plain, document, is_shared, is_inline)


def _shared_nodes(root: yaml.Node | None) -> set[int]:
    """Return the nodes that several keys hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
            continue
        if id(node) in seen:
            shared.add(id(node))
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            pending += [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
    return shared


_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_JSON = json.JSONDecoder()


def _walk_json(text: str, at: int = 0, path: tuple[str, ...] = ()) -> Generator[Entry, None, int]:
    """The keys of a text that `json` has accepted; returns where the value that begins here ends."""
    at = _skip_json(text, at)
    if text[at] != "{":
        return _JSON.raw_decode(text, at)[1]
    at = _skip_json(text, at + 1)
    while text[at] != "}":
        key, end = _JSON.raw_decode(text, at)
        value_at = _skip_json(text, _skip_json(text, end) + 1)
        here = (*path, key)
        if text[value_at] in "{[":
            yield Entry(here, at, end, None, is_inline=text[value_at] == "{")
            at = yield from _walk_json(text, value_at, here)
        else:
            value, value_end = _JSON.raw_decode(text, value_at)
            written = value if isinstance(value, str) else text[value_at:value_end]
            yield Entry(here, at, end, (value_at, value_end), written.strip().lower())
            at = value_end
        at = _skip_json(text, at)
        at = _skip_json(text, at + 1) if text[at] == "," else at
    return at + 1


def _skip_json(text: str, at: int) -> int:
    match = _JSON_SPACE.match(text, at)
    assert match is not None
    return match.end()


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
            yield from (Entry(section[: depth + 1], start, end, None) for depth, (_, start, end) in enumerate(parts))
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
    plain = "" if stop == at else str(tomllib.loads(f"value = {text[at:stop]}")["value"]).strip().lower()
    yield Entry(path, start, end, None if stop == at else (at, stop), plain, is_inline=text[at] == "{")
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
