"""The Python rules applied to one source text, with libcst.

Names are resolved through the file's imports, so `import torch as t; t.cuda.amp.autocast` and `from torch.cuda.amp
import autocast as ac` are the same name, and a local variable of that name is not. Edits replace characters of the
text, so everything else keeps its formatting. Where the name was imported by itself the import is rewritten and the
uses keep their local name; elsewhere the dotted name is replaced where it stands.
"""

from __future__ import annotations

import ast
import io
import re
import threading
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from deepseek.compat.migration.findings import Edit, Finding, Lines, find, unreadable
from deepseek.compat.migration.rules import PythonRule
from deepseek.core.extras import require

# libcst parses by recursion in native code and takes the process with it when the stack ends. Python itself refuses 200
# nested brackets, this file refuses longer chains of operators between two commas, and the stack holds their product.
_MAX_CHAIN = 1000
_STACK_BYTES = 512 << 20


def check_python(content: bytes, path: str, rules: tuple[PythonRule, ...]) -> list[Finding]:
    """The findings in one file; one that says `unreadable` for broken source."""
    try:
        text = decode_python(content)
        _refuse_broken(text)
    except SyntaxError as error:
        line, column = error.lineno or 1, max(error.offset or 1, 1)
        return [unreadable(path, f"not valid Python: {error.msg}", "mend or exclude the file", line, column)]
    except (UnicodeDecodeError, ValueError) as error:
        return [unreadable(path, f"not valid Python: {error}", "mend or exclude the file")]
    except (RecursionError, MemoryError, tokenize.TokenError):
        return [unreadable(path, "nested too deeply to be parsed", "exclude the file")]
    findings: list[Finding] = []
    failures: list[Exception] = []

    def scan() -> None:
        try:
            findings.extend(_scan(text, path, rules))
        except Exception as error:  # noqa: BLE001 - handed to the caller's thread below
            failures.append(error)

    _run_with_deep_stack(scan)
    if failures and isinstance(failures[0], RecursionError):
        return [unreadable(path, "nested too deeply to be parsed", "exclude the file")]
    if failures:
        raise failures[0]
    return findings


def decode_python(content: bytes) -> str:
    """Source text by its byte order mark and coding line, line ends untouched. Raises as Python itself would."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)


def is_decodable(content: bytes) -> bool:
    """Whether the bytes are text at all."""
    try:
        decode_python(content)
    except (SyntaxError, UnicodeDecodeError):
        return False
    return True


def encode_python(text: str, content: bytes) -> bytes:
    """`text` in the encoding of the `content` it came from."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return text.encode(encoding)


def _refuse_broken(text: str) -> None:
    ast.parse(text)
    chain = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_end = token.type in (tokenize.NEWLINE, tokenize.INDENT) or token.string in (",", ":", "=")
        chain = 0 if is_end else chain + 1
        if chain > _MAX_CHAIN and token.type not in (tokenize.COMMENT, tokenize.NL):
            raise RecursionError


def _run_with_deep_stack(scan: Any) -> None:
    before = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=scan)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()


def _scan(text: str, path: str, rules: tuple[PythonRule, ...]) -> list[Finding]:
    cst = require("libcst", extra="migrate")
    metadata = require("libcst.metadata", extra="migrate")
    wrapper = metadata.MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    names = wrapper.resolve(metadata.QualifiedNameProvider)
    places = wrapper.resolve(metadata.PositionProvider)
    source = _Source(text, Lines(text), cst, names, places, metadata.QualifiedNameSource.IMPORT)
    uses = _collect(source, wrapper.module)
    findings = [found for rule in rules for found in _apply(rule, uses, source, path)]
    return sorted(findings, key=lambda each: (each.line, each.column))


@dataclass(frozen=True)
class _Source:
    """A parsed text with what libcst knows about it."""

    text: str
    lines: Lines
    cst: ModuleType
    names: Any
    places: Any
    imported: Any

    def span(self, node: Any) -> tuple[int, int]:
        """Offsets of a node, without its surrounding space."""
        place = self.places[node]
        start = self.lines.offset(place.start.line, place.start.column)
        return start, self.lines.offset(place.end.line, place.end.column)

    def qualified(self, node: Any) -> set[str]:
        """The full names that a use can have through the imports."""
        found = self.names.get(node, ())
        # libcst computes these when they are asked for.
        names = found() if callable(found) else found
        return {each.name for each in names if each.source == self.imported}


@dataclass
class _Uses:
    """Every place of a file at which a rule may look."""

    imports: list[Any] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    """Names and dotted names in expressions, those that are called included."""


def _collect(source: _Source, module: Any) -> _Uses:
    cst, uses = source.cst, _Uses()
    pending = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, cst.ImportFrom):
            uses.imports.append(node)
            continue
        if isinstance(node, cst.Import):
            continue
        if isinstance(node, cst.Call):
            uses.calls.append(node)
        if isinstance(node, cst.Attribute | cst.Name) and source.qualified(node):
            uses.references.append(node)
        # Of `a.b.c` the uses are `a.b.c`, `a.b` and `a`; `b` and `c` by themselves are none.
        pending += [node.value] if isinstance(node, cst.Attribute) else list(node.children)
    return uses


def _dotted(node: Any, cst: ModuleType) -> str | None:
    """`a.b.c` of a node that is nothing but names and dots."""
    parts = []
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    return ".".join(reversed([*parts, node.value])) if isinstance(node, cst.Name) else None


def _apply(rule: PythonRule, uses: _Uses, source: _Source, path: str) -> Iterator[Finding]:
    calls = [each for each in uses.calls if rule.name in source.qualified(each.func)]
    if rule.keyword or rule.add_keyword:
        for call in calls:
            edits = _rename_keyword(rule, call, source) if rule.keyword else _add_keyword(rule, call, source)
            if edits is not None:
                yield find(rule, path, *source.lines.place(source.span(call.func)[0]), edits)
        return
    references = [each for each in uses.references if rule.name in source.qualified(each)]
    called = {id(each.func) for each in calls}
    # A reference that is not called cannot be given the new argument, so then a person has to look.
    is_fixable = rule.replace_with is not None and not (
        rule.first_argument and any(id(each) not in called for each in references)
    )
    for statement in uses.imports:
        alias = _imported_alias(rule.name, statement, source)
        if alias is not None:
            edits = _rewrite_import(rule, statement, alias, source) if is_fixable else []
            yield find(rule, path, *source.lines.place(source.span(alias)[0]), edits, rule.name)
    by_func = {id(each.func): each for each in calls}
    for node in references:
        edits = _rewrite_use(rule, node, by_func.get(id(node)), source) if is_fixable else []
        is_settled_by_import = is_fixable and isinstance(node, source.cst.Name)
        if edits or not is_settled_by_import:
            yield find(rule, path, *source.lines.place(source.span(node)[0]), edits, rule.name)


def _imported_alias(name: str, statement: Any, source: _Source) -> Any:
    module = _dotted(statement.module, source.cst) if statement.module is not None else None
    if module is None or statement.relative or isinstance(statement.names, source.cst.ImportStar):
        return None
    found = [each for each in statement.names if f"{module}.{each.name.value}" == name]
    return found[0] if found else None


def _rewrite_import(rule: PythonRule, statement: Any, alias: Any, source: _Source) -> list[Edit]:
    """`from old import a, b` becomes `from new import a` before `from old import b`; the local name stays."""
    module, _, name = (rule.replace_with or "").rpartition(".")
    if not module:
        return []
    local = alias.asname.name.value if alias.asname else alias.name.value
    new = f"from {module} import {name}" + ("" if local == name else f" as {local}")
    start, end = source.span(statement)
    others = [each for each in statement.names if each is not alias]
    if not others:
        return [Edit(start, end, new)]
    indent = source.text[source.text.rfind("\n", 0, start) + 1 : start]
    if indent.strip():
        return [Edit(start, start, f"{new}; "), _without(statement, alias, source)]
    newline = "\r\n" if "\r\n" in source.text else "\n"
    return [Edit(start, start, new + newline + indent), _without(statement, alias, source)]


def _without(statement: Any, alias: Any, source: _Source) -> Edit:
    """Take one name and its comma out of the list."""
    names = list(statement.names)
    index = names.index(alias)
    if index + 1 < len(names):
        return Edit(source.span(alias)[0], source.span(names[index + 1])[0], "")
    before = source.span(names[index - 1].asname or names[index - 1].name)[1]
    return Edit(before, source.span(alias.asname or alias.name)[1], "")


def _rewrite_use(rule: PythonRule, node: Any, call: Any, source: _Source) -> list[Edit]:
    edits = []
    start, end = source.span(node)
    local, new = source.text[start:end], rule.replace_with or ""
    known = rule.name.split(".")[: len(rule.name.split(".")) - local.count(".")]
    prefix = ".".join(known)
    if "." not in new:
        edits.append(Edit(start, end, new))
    elif "." in local and new.startswith(prefix + "."):
        edits.append(Edit(start, end, local.partition(".")[0] + new.removeprefix(prefix)))
    elif "." in local:
        edits += [Edit(start, end, new), *_import_for(new, source)]
    if rule.first_argument and call is not None:
        edits.append(_first_argument(rule.first_argument, call, end, source))
    return edits


def _import_for(name: str, source: _Source) -> list[Edit]:
    """`import torch` before the first import, where the file does not have it."""
    module = name.rpartition(".")[0]
    if re.search(rf"^import {re.escape(module)}\s*$", source.text, flags=re.MULTILINE):
        return []
    first = re.search(r"^(?:import|from (?!__future__))\b", source.text, flags=re.MULTILINE)
    at = first.start() if first else 0
    return [Edit(at, at, f"import {module}\n")]


def _first_argument(argument: str, call: Any, end: int, source: _Source) -> Edit:
    at = source.text.index("(", end) + 1
    return Edit(at, at, f"{argument}, " if call.args else argument)


def _rename_keyword(rule: PythonRule, call: Any, source: _Source) -> list[Edit] | None:
    found = [each.keyword for each in call.args if each.keyword is not None and each.keyword.value == rule.keyword]
    return [Edit(*source.span(found[0]), rule.keyword_to or "")] if found else None


def _add_keyword(rule: PythonRule, call: Any, source: _Source) -> list[Edit] | None:
    """Nothing to find where the keyword is given; found without an edit where `**options` may hold it."""
    if any(each.keyword is not None and each.keyword.value == rule.add_keyword for each in call.args):
        return None
    if any(each.star == "**" for each in call.args):
        return []
    new = f"{rule.add_keyword}={rule.add_value}"
    if not call.args:
        return [_first_argument(new, call, source.span(call.func)[1], source)]
    at = source.span(call.args[-1].value)[1]
    return [Edit(at, at, f", {new}")]
