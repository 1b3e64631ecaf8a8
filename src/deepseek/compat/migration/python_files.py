"""The Python rules applied to one source text.

Names are resolved through the file's imports (`python_names.py`), so `import torch as t; t.cuda.amp.autocast` and
`from torch.cuda.amp import autocast as ac` are the same name, and a local variable of that name is not. All edits of a
file are planned in one pass over the positions of its tree and replace single characters of the text, so everything
else keeps its formatting. Where the name was imported by itself the import is rewritten and the uses keep their local
name; elsewhere the dotted name is replaced where it stands.

A rule is applied to all of its uses in a file or to none: what a person has to look at (a name that is not called, that
may be something else, arguments behind a star, quotes that no f-string has left) is found and stays as it is, with the
reason.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from deepseek.compat.migration.findings import Edit, Finding, Lines, apply_edits_at, choose_edits, find, unreadable
from deepseek.compat.migration.python_names import Names, Use, children, find_names
from deepseek.compat.migration.rules import PythonRule

# Space, comments and line continuations, which may stand between any two tokens inside brackets.
_SPACE = re.compile(r"(?:[ \t\f\r\n]|\\\r?\n|#[^\r\n]*)*")


# Statements of Python 2 that are no syntax of Python 3.
_PYTHON_2 = re.compile(
    rb"""^[ \t]*(?:(?:print|exec)[ \t]+["'\w]|except[ \t]+[\w.(), \t]+,[ \t]*\w+[ \t]*:|raise[ \t]+[\w.]+[ \t]*,)|<>""",
    re.MULTILINE,
)


def is_like_python_2(content: bytes) -> bool:
    """Whether a source has the looks of Python 2, in strings and comments too; to be asked before or after parsing."""
    return _PYTHON_2.search(content) is not None


def check_python(content: bytes, path: str, rules: tuple[PythonRule, ...]) -> list[Finding]:
    """Return the findings in one file; one that says `unreadable` for broken source, also where there is no rule."""
    try:
        text = decode_python(content)
        tree = _parse(text)
        wanted = frozenset(name for rule in rules for name in rule.names)
        names = find_names(tree, wanted) if rules else Names()
    except SyntaxError as error:
        if "too many nested" in error.msg or "too complex" in error.msg:
            return [unreadable(path, "nested too deeply to be parsed", "exclude the file")]
        line, column = error.lineno or 1, max(error.offset or 1, 1)
        fix = "port it to Python 3 first, or exclude it" if is_like_python_2(content) else "mend or exclude the file"
        return [unreadable(path, f"not valid Python: {error.msg}", fix, line, column)]
    except (UnicodeDecodeError, ValueError) as error:
        return [unreadable(path, f"not valid Python: {error}", "mend or exclude the file")]
    except (RecursionError, MemoryError):
        return [unreadable(path, "nested too deeply to be parsed", "exclude the file")]
    source = _Source(text, tree, names)
    findings = [found for rule in rules for found in _apply(rule, source, path)]
    findings = _join_import_edits(sorted(findings, key=lambda finding: (finding.line, finding.column)), source)
    chosen = set(choose_edits(findings))
    overlapping = [found for found in findings if not chosen.issuperset(found.edits)]
    # Edits of one file belong together: an import without its uses would be worse than neither.
    reason = "it overlaps another change" if overlapping else "the edited file would not compile or say the same"
    if overlapping or not _is_right(findings, source):
        return [found.for_person(reason) if found.edits else found for found in findings]
    return findings


class _UnsettledError(Exception):
    """A use has to be settled by a person; the text is the reason."""


def _parse(text: str) -> ast.Module:
    """Parse source without the warnings that it deserves by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _is_right(findings: Sequence[Finding], source: _Source) -> bool:
    """Whether the edited text compiles and keeps every literal, docstrings included.

    Statements of the module that no edit touches stay what they are; the others are read again, each by itself.
    """
    edits = choose_edits(findings)
    if not edits:
        return True
    body: list[ast.stmt] = []
    gone: list[ast.stmt] = []
    changed: list[ast.stmt] = []
    num_placed = 0
    for statements, start, end in source.blocks:
        own = [edit for edit in edits if start <= edit.start and edit.end <= end and edit.start < end]
        num_placed += len(own)
        new = statements
        if own:
            try:
                new = _parse(apply_edits_at(source.text[start:end], own, start)).body
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                return False
            gone += statements
            changed += new
        is_steering = any(isinstance(line, ast.ImportFrom) and line.module == "__future__" for line in statements)
        body = [*body, *new] if is_steering or own else body
    return num_placed == len(edits) and _compiles(body) and not _literals(gone) - _literals(changed)


def _compiles(body: list[ast.stmt]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(ast.Module(body, []), "edited", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _first_line(statement: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _literals(statements: Iterable[ast.stmt]) -> Counter[str]:
    nodes = (node for statement in statements for node in ast.walk(statement))
    return Counter(repr(node.value) for node in nodes if isinstance(node, ast.Constant))


def _find_parents(top: ast.stmt) -> dict[ast.AST, ast.AST]:
    """Return the node around each node inside a statement."""
    parents: dict[ast.AST, ast.AST] = {}
    pending: list[ast.AST] = [top]
    while pending:
        node = pending.pop()
        inside = children(node)
        parents |= dict.fromkeys(inside, node)
        pending += inside
    return parents


def decode_python(content: bytes) -> str:
    """Decode source by its byte order mark and coding line, line ends untouched. Raises as Python itself would."""
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
    """Encode `text` as the `content` it came from is encoded."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return text.encode(encoding)


@dataclass(frozen=True)
class _Source:
    """A parsed text with what its names mean."""

    text: str
    tree: ast.Module
    names: Names

    @cached_property
    def lines(self) -> Lines:
        """Where the lines begin."""
        return Lines(self.text)

    @cached_property
    def blocks(self) -> list[tuple[list[ast.stmt], int, int]]:
        """Statements of the module with the offsets of their lines; those that share a line are one block."""
        starts = [*self.lines.starts, len(self.text)]
        found: list[tuple[list[ast.stmt], int, int]] = []
        for statement in self.tree.body:
            start, end = starts[_first_line(statement) - 1], starts[statement.end_lineno or 0]
            if found and start < found[-1][2]:
                together, first, last = found.pop()
                found.append(([*together, statement], first, max(last, end)))
            else:
                found.append(([statement], start, end))
        return found

    @cached_property
    def parents_by_statement(self) -> dict[ast.stmt, dict[ast.AST, ast.AST]]:
        """The node around each node, for the statements of the module that were looked into."""
        return {}

    def around(self, node: ast.expr) -> Iterator[ast.AST]:
        """Yield the nodes around an expression, inside out."""
        for statement in self.tree.body:
            if _first_line(statement) <= node.lineno <= (statement.end_lineno or 0):
                if statement not in self.parents_by_statement:
                    self.parents_by_statement[statement] = _find_parents(statement)
                parents = self.parents_by_statement[statement]
                inner: ast.AST = node
                while inner in parents:
                    inner = parents[inner]
                    yield inner

    @cached_property
    def strings(self) -> list[tuple[int, int, str]]:
        """Start, end and quote of every string literal, f-strings as a whole."""
        starts: list[tuple[int, str]] = []
        found = []
        for token in tokenize.generate_tokens(io.StringIO(self.text, newline="").readline):
            name = tokenize.tok_name[token.type]
            if name in ("STRING", "FSTRING_START", "TSTRING_START"):
                quote = re.sub(r"^\w*", "", token.string)[0]
                starts.append((self.lines.offset(*token.start), quote))
            if name in ("STRING", "FSTRING_END", "TSTRING_END"):
                start, quote = starts.pop()
                found.append((start, self.lines.offset(*token.end), quote))
        return found

    def offset(self, line: int, column_bytes: int) -> int:
        """Return the offset of a position of the tree, whose columns count bytes of UTF-8."""
        start = self.lines.starts[line - 1]
        part = self.text[start : start + column_bytes]
        if not part.isascii():
            part = part.encode()[:column_bytes].decode("utf-8", "ignore")
        return start + len(part)

    def span(self, node: ast.expr | ast.stmt | ast.alias | ast.keyword) -> tuple[int, int]:
        """Return the offsets of a node, without brackets around it."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def skip(self, at: int) -> int:
        """Return the offset of the next token."""
        match = _SPACE.match(self.text, at)
        assert match is not None
        return match.end()

    def newline(self) -> str:
        """Return the line end of the file."""
        match = re.search(r"\r\n|\r|\n", self.text)
        return match[0] if match else "\n"


def _apply(rule: PythonRule, source: _Source, path: str) -> Iterator[Finding]:
    uses = [use for use in source.names.uses if use.name in rule.names]
    if rule.keyword or rule.add_keyword:
        yield from _apply_to_calls(rule, uses, source, path)
        return
    # Under a name of the project's own it changes with the assignment, unless its calls take other arguments.
    uses = [use for use in uses if rule.changes_arguments or not use.is_renamed]
    imports = [
        (alias, f"{statement.module}.{alias.name}")
        for statement in source.names.imports
        for alias in statement.names
        if f"{statement.module}.{alias.name}" in rule.names
    ]
    plans: list[list[Edit]] = []
    reasons: dict[ast.alias | ast.expr, str] = {}
    for alias, _ in imports:
        if rule.replace_with and (reason := _doubt_import(rule, alias, source, path)):
            reasons[alias] = reason
    for use in uses:
        plans.append([])
        if rule.replace_with:
            try:
                plans[-1] = _plan_use(rule, use, source)
            except _UnsettledError as error:
                reasons[use.node] = str(error)

    def report(node: ast.alias | ast.expr, name: str, edits: Sequence[Edit]) -> Finding:
        found = find(rule, path, *source.lines.line_and_column(source.span(node)[0]), () if reasons else edits, name)
        if not reasons:
            return found
        first = next(iter(reasons))
        return found.for_person(reasons.get(node, f"left with line {first.lineno}: {reasons[first]}"))

    for alias, name in imports:
        marker = [_ImportEdit(*source.span(alias), rule.replace_with)] if rule.replace_with else []
        yield report(alias, name, marker)
    is_fixable = bool(rule.replace_with) and not reasons
    for use, edits in zip(uses, plans, strict=True):
        if edits or not (is_fixable and not use.num_attributes):
            yield report(use.node, use.name, edits)


def _doubt_import(rule: PythonRule, alias: ast.alias, source: _Source, path: str) -> str | None:
    """Say why an import cannot be rewritten; `None` where it can."""
    local = alias.asname or alias.name
    if "." not in (rule.replace_with or ""):
        return f"{rule.replace_with} is built in and not imported"
    if len(source.names.bindings[local]) != 1:
        return f"{local} is something else in this file, too"
    # Other files that take the name from an interface like these would go on to call it the old way.
    is_interface = path.endswith("__init__.py") or "__all__" in source.names.bindings
    return "other files may import it from here" if is_interface and rule.changes_arguments else None


def _apply_to_calls(rule: PythonRule, uses: Sequence[Use], source: _Source, path: str) -> Iterator[Finding]:
    for use in uses:
        call = next(source.around(use.node), None)
        if not isinstance(call, ast.Call) or call.func is not use.node:
            continue
        given = {keyword.arg for keyword in call.keywords}
        if rule.keyword in given if rule.keyword else rule.add_keyword not in given:
            found = find(rule, path, *source.lines.line_and_column(source.span(use.node)[0]))
            try:
                _require_certain(use)
                edit = _rename_keyword(rule, call, source) if rule.keyword else _add_keyword(rule, call, source)
                yield found.with_edits([edit])
            except _UnsettledError as error:
                yield found.for_person(str(error))


# --- One use ---


def _require_certain(use: Use) -> None:
    if not use.is_certain:
        raise _UnsettledError(f"{ast.unparse(use.node)} may be something else here")


def _plan_use(rule: PythonRule, use: Use, source: _Source) -> list[Edit]:
    """Return the edits that settle a use. Raises `_UnsettledError` where a person has to."""
    _require_certain(use)
    if not isinstance(use.node.ctx, ast.Load):
        raise _UnsettledError("it is set here")
    name_edits = _replace_name(rule, use, source)
    if not rule.changes_arguments:
        return name_edits
    around = next(source.around(use.node), None)
    if isinstance(around, ast.Call) and around.func is use.node:
        return [*name_edits, *_replace_arguments(rule, around, source)]
    if rule.is_decorator and use.node in getattr(around, "decorator_list", []):
        end = source.span(use.node)[1]
        missing = ", ".join(f"{name}={value}" for name, value in rule.defaults.items())
        return [*name_edits, Edit(end, end, f"({missing})")]
    if use.is_local_alias:  # its calls are uses of their own
        return name_edits
    if use.alias:
        raise _UnsettledError(f"{use.alias} is another name for it, by which other code may call it")
    raise _UnsettledError("it is not called here, and its calls take other arguments now")


def _replace_name(rule: PythonRule, use: Use, source: _Source) -> list[Edit]:
    new, parts = rule.replace_with or "", use.name.split(".")
    start, end = source.span(use.node)
    if "." not in new:
        # A built-in stands for itself only where the module binds no other thing to its name.
        if not use.num_attributes:
            raise _UnsettledError(f"{new} is built in and not imported")
        if new in source.names.bindings:
            raise _UnsettledError(f"{new} is a name of this file")
        _require_text(use, source)
        return [Edit(start, end, new)]
    if not use.num_attributes:
        return []
    _require_text(use, source)
    module = ".".join(parts[: len(parts) - use.num_attributes])
    if new.startswith(module + "."):
        local = ast.unparse(use.node).partition(".")[0]
        return [Edit(start, end, local + new.removeprefix(module))]
    return [Edit(start, end, new), *_import_module(new.rpartition(".")[0], source)]


def _require_text(use: Use, source: _Source) -> None:
    """Check that the text at a node's position is the node; before Python 3.12 one inside an f-string may be off."""
    start, end = source.span(use.node)
    if _SPACE.sub("", source.text[start:end]) != ast.unparse(use.node):
        raise _UnsettledError("it stands inside an f-string")


def _import_module(module: str, source: _Source) -> list[Edit]:
    """Return the edit that adds `import module`, none where it is there."""
    top = module.partition(".")[0]
    if source.names.bindings.get(top, {top}) != {top}:
        raise _UnsettledError(f"{top} is something else in this file")
    is_there = any(
        isinstance(statement, ast.Import) and any(a.name == module and not a.asname for a in statement.names)
        for statement in source.tree.body
    )
    if is_there:
        return []
    body = source.tree.body[1:] if ast.get_docstring(source.tree) is not None else source.tree.body
    rest = [line for line in body if not (isinstance(line, ast.ImportFrom) and line.module == "__future__")]
    imports = [line for line in rest if isinstance(line, ast.Import | ast.ImportFrom)]
    for statement in (*imports, *rest):
        decorators = getattr(statement, "decorator_list", [])
        line = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
        at = source.lines.starts[line - 1]
        if source.text[at : at + 1].strip() and (decorators or source.span(statement)[0] == at):
            return [Edit(at, at, f"import {module}{source.newline()}")]
    raise _UnsettledError(f"no line of its own is left for `import {module}`")


# --- The arguments of a call ---


def _replace_arguments(rule: PythonRule, call: ast.Call, source: _Source) -> list[Edit]:
    """Return the edits that give the new function what the old one took."""
    # Where the rule does not know the parameters, nothing depends on which of them are given.
    known = _given_parameters(rule, call) if rule.parameters else set()
    if missing_needs := [name for name in rule.needs if name not in known]:
        raise _UnsettledError(f"without {' and '.join(missing_needs)} the new name means something else")
    _require_allowed(rule, known)
    opening, *positions = _argument_starts(call, source)
    quotes = _free_quotes(call, source)
    edits = []
    if rule.first_argument:
        first = rule.first_argument.replace('"', quotes)
        edits.append(Edit(opening + 1, opening + 1, f"{first}, " if call.args or call.keywords else first))
    if rule.num_positional is not None:
        for name, argument, at in list(zip(rule.parameters, call.args, positions, strict=False))[rule.num_positional :]:
            if isinstance(argument, ast.NamedExpr):
                raise _UnsettledError("an argument is a := expression")
            edits.append(Edit(at, at, f"{name}="))
    missing = [f"{name}={value}".replace('"', quotes) for name, value in rule.defaults.items() if name not in known]
    if missing:
        edits.append(_append(", ".join(missing), call, opening, source))
    return edits


def _require_allowed(rule: PythonRule, given: set[str]) -> None:
    if refused := [name for name in rule.refuses if name in given]:
        raise _UnsettledError(f"{' and '.join(refused)} cannot be given with it")


def _given_parameters(rule: PythonRule, call: ast.Call) -> set[str]:
    """Return the parameters that a call gives, by the rule's order where they stand by position."""
    keywords = [keyword.arg for keyword in call.keywords]
    if any(isinstance(argument, ast.Starred) for argument in call.args) or None in keywords:
        raise _UnsettledError("a star hides its arguments")
    if len(call.args) > len(rule.parameters) > 0:
        raise _UnsettledError(f"it takes more arguments than {', '.join(rule.parameters)}")
    return {*rule.parameters[: len(call.args)], *(name for name in keywords if name is not None)}


def _argument_starts(call: ast.Call, source: _Source) -> list[int]:
    """Return the offset of the opening bracket and of every positional argument, its own brackets included."""
    if any(isinstance(argument, ast.GeneratorExp) for argument in call.args):
        raise _UnsettledError("its argument is a generator")
    at = source.skip(source.span(call.func)[1])
    while source.text[at : at + 1] == ")":
        at = source.skip(at + 1)
    if source.text[at : at + 1] != "(" or source.text[source.span(call)[1] - 1] != ")":
        raise _UnsettledError("it stands inside an f-string")
    starts = [at]
    at = source.skip(at + 1)
    for argument in call.args:
        starts.append(at)
        at = source.skip(_end_with_brackets(argument, call, source))
        at = source.skip(at + 1) if source.text[at] == "," else at
    return starts


def _end_with_brackets(node: ast.expr | ast.keyword, call: ast.Call, source: _Source) -> int:
    """Return where an argument ends, brackets around it included."""
    last = source.span(call)[1] - 1
    end = source.span(node)[1]
    while (at := source.skip(end)) < last and source.text[at] == ")":
        end = at + 1
    return end


def _append(text: str, call: ast.Call, opening: int, source: _Source) -> Edit:
    """Return the edit that adds arguments behind the last one."""
    arguments: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
    if not arguments:
        return Edit(opening + 1, opening + 1, text)
    last = max(arguments, key=lambda argument: source.span(argument)[1])
    at = _end_with_brackets(last, call, source)
    return Edit(at, at, f", {text}")


def _free_quotes(call: ast.Call, source: _Source) -> str:
    """Return the quotes that a string may have at a call; before Python 3.12 an f-string cannot hold its own ones."""
    num_around = sum(isinstance(node, ast.JoinedStr) for node in source.around(call))
    if not num_around:
        return '"'
    start, end = source.span(call)
    around = {quote for first, last, quote in source.strings if first < start and end < last}
    free = [quote for quote in "\"'" if quote not in around]
    if num_around != 1 or len(around) != 1 or not free:
        raise _UnsettledError("it stands inside an f-string that has no quotes left")
    return free[0]


def _rename_keyword(rule: PythonRule, call: ast.Call, source: _Source) -> Edit:
    if any(keyword.arg == rule.keyword_to for keyword in call.keywords):
        raise _UnsettledError(f"{rule.keyword_to} is given, too")
    (found,) = (keyword for keyword in call.keywords if keyword.arg == rule.keyword)
    at = source.span(found)[0]
    if not source.text.startswith(rule.keyword or "", at):
        raise _UnsettledError("it stands inside an f-string")
    return Edit(at, at + len(rule.keyword or ""), rule.keyword_to or "")


def _add_keyword(rule: PythonRule, call: ast.Call, source: _Source) -> Edit:
    """Return the edit that names an argument, unless `**options` may hold it or another one does not go with it."""
    if rule.parameters or any(keyword.arg is None for keyword in call.keywords):
        _require_allowed(rule, _given_parameters(rule, call))
    opening, quotes = _argument_starts(call, source)[0], _free_quotes(call, source)
    return _append(f"{rule.add_keyword}={rule.add_value}".replace('"', quotes), call, opening, source)


# --- Imports ---


class _ImportEdit(Edit):
    """An imported name that becomes another one; `_join_import_edits` makes edits of all those of one statement."""


def _join_import_edits(findings: list[Finding], source: _Source) -> list[Finding]:
    """Replace the marks on imported names by the edits of their whole statement, the same ones for each of them."""
    marked = {
        (edit.start, edit.end): edit for found in findings for edit in found.edits if isinstance(edit, _ImportEdit)
    }
    if not marked:
        return findings
    by_alias: dict[tuple[int, int], tuple[Edit, ...]] = {}
    for statement in source.names.imports:
        replaced = [alias for alias in statement.names if source.span(alias) in marked]
        if replaced:
            new = {id(alias): marked[source.span(alias)].replacement for alias in replaced}
            edits = tuple(_rewrite_import(statement, new, source))
            by_alias |= {source.span(alias): edits for alias in replaced}
    joined = []
    for found in findings:
        edits = tuple(
            new
            for edit in found.edits
            for new in (by_alias[edit.start, edit.end] if isinstance(edit, _ImportEdit) else (edit,))
        )
        joined.append(found.with_edits(edits))
    return joined


def _rewrite_import(statement: ast.ImportFrom, new: dict[int, str], source: _Source) -> Iterator[Edit]:
    """`from old import a, b` becomes `from new import a` before `from old import b`; local names stay."""
    start, end = source.span(statement)
    line_start = source.lines.starts[statement.lineno - 1]
    before = source.text[line_start:start]
    between = "; " if before.strip() else source.newline() + before
    lines = []
    for alias in statement.names:
        if id(alias) in new:
            module, _, name = new[id(alias)].rpartition(".")
            local = alias.asname or alias.name
            lines.append(f"from {module} import {name}" + ("" if local == name else f" as {local}"))
    kept = [index for index, alias in enumerate(statement.names) if id(alias) not in new]
    if not kept:
        yield Edit(start, end, between.join(lines))
        return
    yield Edit(start, start, between.join(lines) + between)
    spans = [source.span(alias) for alias in statement.names]
    for index in range(kept[-1]):
        if index not in kept:
            yield Edit(spans[index][0], spans[index + 1][0], "")
    if kept[-1] + 1 < len(spans):
        yield Edit(spans[kept[-1]][1], spans[-1][1], "")
