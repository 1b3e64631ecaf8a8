"""The Python rules applied to one source text.

Names are resolved through the file's imports (`python_names.py`), so `import torch as t; t.cuda.amp.autocast` and
`from torch.cuda.amp import autocast as ac` are the same name, and a local variable of that name is not. All edits of a
file are planned in one pass over the positions of its tree and replace single characters of the text, so everything
else keeps its formatting. Where the name was imported by itself the import is rewritten and the uses keep their local
name; elsewhere the dotted name is replaced where it stands.

A rule is applied to all of its uses in a file or to none: what a person has to look at (a name that is not called, that
may be something else, arguments behind a star, quotes that no f-string has left) is found and stays as it is.
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


def check_python(content: bytes, path: str, rules: tuple[PythonRule, ...]) -> list[Finding]:
    """Return the findings in one file; one that says `unreadable` for broken source."""
    try:
        text = decode_python(content)
        tree = _parse(text)
        wanted = frozenset(rule.name for rule in rules)
        names = find_names(tree, wanted)
    except SyntaxError as error:
        if "too many nested" in error.msg or "too complex" in error.msg:
            return [unreadable(path, "nested too deeply to be parsed", "exclude the file")]
        line, column = error.lineno or 1, max(error.offset or 1, 1)
        return [unreadable(path, f"not valid Python: {error.msg}", "mend or exclude the file", line, column)]
    except (UnicodeDecodeError, ValueError) as error:
        return [unreadable(path, f"not valid Python: {error}", "mend or exclude the file")]
    except (RecursionError, MemoryError):
        return [unreadable(path, "nested too deeply to be parsed", "exclude the file")]
    source = _Source(text, tree, names)
    findings = [found for rule in rules for found in _apply(rule, source, path)]
    findings = _join_import_edits(sorted(findings, key=lambda finding: (finding.line, finding.column)), source)
    # Edits of one file belong together: an import without its uses would be worse than neither.
    return findings if _is_right(findings, source) else [found.with_edits(()) for found in findings]


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
    uses = [use for use in source.names.uses if use.name == rule.name]
    if rule.keyword or rule.add_keyword:
        yield from _apply_to_calls(rule, uses, source, path)
        return
    imports = [
        alias
        for statement in source.names.imports
        for alias in statement.names
        if f"{statement.module}.{alias.name}" == rule.name
    ]
    # Other files that take the name from an interface like these would go on to call it the old way.
    is_interface = path.endswith("__init__.py") or "__all__" in source.names.bindings
    plans = [_plan_use(rule, use, source) for use in uses]
    is_fixable = rule.replace_with is not None and all(plan is not None for plan in plans)
    is_fixable = is_fixable and all(
        "." in (rule.replace_with or "")
        and len(source.names.bindings[alias.asname or alias.name]) == 1
        and not (is_interface and rule.changes_arguments)
        for alias in imports
    )
    for alias in imports:
        marker = [_ImportEdit(*source.span(alias), rule.replace_with or "")] if is_fixable else []
        yield find(rule, path, *source.lines.line_and_column(source.span(alias)[0]), marker, rule.name)
    for use, edits in zip(uses, plans, strict=True):
        kept = edits or [] if is_fixable else []
        if kept or not (is_fixable and not use.num_attributes):
            yield find(rule, path, *source.lines.line_and_column(source.span(use.node)[0]), kept, rule.name)


def _apply_to_calls(rule: PythonRule, uses: Sequence[Use], source: _Source, path: str) -> Iterator[Finding]:
    for use in uses:
        call = next(source.around(use.node), None)
        if not isinstance(call, ast.Call) or call.func is not use.node:
            continue
        given = {keyword.arg for keyword in call.keywords}
        if rule.keyword in given if rule.keyword else rule.add_keyword not in given:
            edits = _rename_keyword(rule, call, source) if rule.keyword else _add_keyword(rule, call, source)
            edits = edits if use.is_certain else None
            yield find(rule, path, *source.lines.line_and_column(source.span(use.node)[0]), edits or ())


# --- One use ---


def _plan_use(rule: PythonRule, use: Use, source: _Source) -> list[Edit] | None:
    """Return the edits that settle a use; `None` where a person has to."""
    if not use.is_certain or not isinstance(use.node.ctx, ast.Load) or rule.replace_with is None:
        return None
    call = next(source.around(use.node), None)
    is_called = isinstance(call, ast.Call) and call.func is use.node
    name_edits = _replace_name(rule, use, source)
    if name_edits is None or not rule.changes_arguments:
        return name_edits
    if not is_called:
        return None
    assert isinstance(call, ast.Call)
    argument_edits = _replace_arguments(rule, call, source)
    return None if argument_edits is None else [*name_edits, *argument_edits]


def _replace_name(rule: PythonRule, use: Use, source: _Source) -> list[Edit] | None:
    new, parts = rule.replace_with or "", rule.name.split(".")
    start, end = source.span(use.node)
    if "." not in new:
        # A built-in stands for itself only where the module binds no other thing to its name.
        is_free = new not in source.names.bindings and use.num_attributes > 0
        return [Edit(start, end, new)] if is_free and _is_where_the_tree_says(use, source) else None
    if not use.num_attributes:
        return []
    if not _is_where_the_tree_says(use, source):
        return None
    module = ".".join(parts[: len(parts) - use.num_attributes])
    if new.startswith(module + "."):
        local = ast.unparse(use.node).partition(".")[0]
        return [Edit(start, end, local + new.removeprefix(module))]
    needed = _import_module(new.rpartition(".")[0], source)
    return None if needed is None else [Edit(start, end, new), *needed]


def _is_where_the_tree_says(use: Use, source: _Source) -> bool:
    """Whether the text at a node's position is the node; before Python 3.12 positions inside f-strings may be off."""
    start, end = source.span(use.node)
    return _SPACE.sub("", source.text[start:end]) == ast.unparse(use.node)


def _import_module(module: str, source: _Source) -> list[Edit] | None:
    """Return the edit that adds `import module`, none where it is there, `None` where its name is taken."""
    top = module.partition(".")[0]
    if source.names.bindings.get(top, {top}) != {top}:
        return None
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
    return None


# --- The arguments of a call ---


def _replace_arguments(rule: PythonRule, call: ast.Call, source: _Source) -> list[Edit] | None:
    """Return the edits that give the new function what the old one took; `None` where they cannot be told."""
    given = _given_parameters(rule, call)
    if given is None and rule.parameters:
        return None
    known = given or set()
    if any(name not in known for name in rule.needs) or any(name in known for name in rule.refuses):
        return None
    starts = _argument_starts(call, source)
    quotes = _free_quotes(call, source)
    if starts is None or quotes is None:
        return None
    opening, *positions = starts
    edits = []
    if rule.first_argument:
        first = rule.first_argument.replace('"', quotes)
        edits.append(Edit(opening + 1, opening + 1, f"{first}, " if call.args or call.keywords else first))
    if rule.num_positional is not None:
        for name, argument, at in list(zip(rule.parameters, call.args, positions, strict=False))[rule.num_positional :]:
            if isinstance(argument, ast.NamedExpr):
                return None
            edits.append(Edit(at, at, f"{name}="))
    missing = [f"{name}={value}" for name, value in rule.defaults.items() if name not in known]
    if missing:
        edits.append(_append(", ".join(missing), call, opening, source))
    return edits


def _given_parameters(rule: PythonRule, call: ast.Call) -> set[str] | None:
    """Return the old parameters that a call gives; `None` where a star hides them or there are more than known."""
    has_star = any(isinstance(argument, ast.Starred) for argument in call.args)
    keywords = [keyword.arg for keyword in call.keywords]
    if has_star or None in keywords or len(call.args) > len(rule.parameters):
        return None
    return {*rule.parameters[: len(call.args)], *(name for name in keywords if name is not None)}


def _argument_starts(call: ast.Call, source: _Source) -> list[int] | None:
    """Return the offset of the opening bracket and of every positional argument, its own brackets included.

    `None` where the text at the tree's position is no call, and where a generator has the brackets of the call.
    """
    if any(isinstance(argument, ast.GeneratorExp) for argument in call.args):
        return None
    at = source.skip(source.span(call.func)[1])
    while source.text[at : at + 1] == ")":
        at = source.skip(at + 1)
    if source.text[at : at + 1] != "(" or source.text[source.span(call)[1] - 1] != ")":
        return None
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


def _free_quotes(call: ast.Call, source: _Source) -> str | None:
    """Return the quotes that a string may have at a call; before Python 3.12 an f-string cannot hold its own ones."""
    num_around = sum(isinstance(node, ast.JoinedStr) for node in source.around(call))
    if not num_around:
        return '"'
    start, end = source.span(call)
    around = {quote for first, last, quote in source.strings if first < start and end < last}
    free = [quote for quote in "\"'" if quote not in around]
    return free[0] if num_around == 1 and len(around) == 1 and free else None


def _rename_keyword(rule: PythonRule, call: ast.Call, source: _Source) -> list[Edit] | None:
    if any(keyword.arg == rule.keyword_to for keyword in call.keywords):
        return None
    (found,) = (keyword for keyword in call.keywords if keyword.arg == rule.keyword)
    at = source.span(found)[0]
    is_there = source.text.startswith(rule.keyword or "", at)
    return [Edit(at, at + len(rule.keyword or ""), rule.keyword_to or "")] if is_there else None


def _add_keyword(rule: PythonRule, call: ast.Call, source: _Source) -> list[Edit] | None:
    """Return no edit where `**options` may hold the keyword, or where an argument does not go with it."""
    given = _given_parameters(rule, call) if rule.parameters else {keyword.arg for keyword in call.keywords}
    if given is None or None in given or any(name in given for name in rule.refuses):
        return None
    starts, quotes = _argument_starts(call, source), _free_quotes(call, source)
    if starts is None or quotes is None:
        return None
    value = (rule.add_value or "").replace('"', quotes)
    return [_append(f"{rule.add_keyword}={value}", call, starts[0], source)]


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
