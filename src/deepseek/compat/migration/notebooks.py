"""The Python rules applied to the code cells of a notebook, which share their names.

Cells are joined into one text, so that an import in the first one is known in the last; lines that are commands of the
notebook (`%time`, `!pip`) count as empty, and what `files = !ls` assigns as none. Findings name the cell. A notebook is
not edited: its file holds outputs and metadata in a layout of its own.
"""

from __future__ import annotations

import bisect
import json
import re

from deepseek.compat.migration.findings import Finding, unreadable
from deepseek.compat.migration.python_files import check_python
from deepseek.compat.migration.rules import PythonRule

SUFFIX = ".ipynb"
_PYTHON_2 = re.compile(rb'"name":\s*"python2"|"version":\s*"2\.')
_ASSIGNED_COMMAND = re.compile(r"(\s*[^=#'\"()]+=\s*)[!%]")  # `files = !ls`


def check_notebook(content: bytes, path: str, rules: tuple[PythonRule, ...]) -> list[Finding]:
    """Return the findings in one notebook; one that says `unreadable` for a file that is none."""
    try:
        notebook = json.loads(content)
        # Before version 4 the cells stood on worksheets, and their source was called input.
        sheets = notebook.get("worksheets", [notebook])
        if _language(notebook) not in ("", "python", "ipython"):
            return []
        sources = [_source(cell) for sheet in sheets for cell in sheet["cells"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [unreadable(path, f"not a notebook: {type(error).__name__} {error}", "save it anew or exclude it")]
    starts: list[int] = []
    lines: list[str] = []
    for source in sources:
        starts.append(len(lines) + 1)
        lines += source
    findings = []
    for found in check_python("\n".join(lines).encode(), path, rules):
        cell = bisect.bisect_right(starts, found.line)
        findings.append(found.moved(found.line - starts[cell - 1] + 1, f"cell {cell}"))
    return findings


def is_for_python_2(content: bytes) -> bool:
    """Whether the bytes of a notebook name a kernel of Python 2."""
    return _PYTHON_2.search(content) is not None


def _language(notebook: dict[str, dict[str, dict[str, str]]]) -> str:
    """Return the language that a notebook is written in, in lower case; nothing where it does not say."""
    metadata = notebook.get("metadata") or {}
    named = (metadata.get("language_info") or {}).get("name") or (metadata.get("kernelspec") or {}).get("language")
    return str(named or "").lower()


def _source(cell: dict[str, object]) -> list[str]:
    """Return the lines of a cell; none of a cell that holds no Python."""
    source = cell.get("source", cell.get("input", ""))
    text = "".join(str(part) for part in source) if isinstance(source, list) else str(source)
    if cell.get("cell_type") != "code" or text.lstrip().startswith("%%"):
        return []
    return [_without_command(line) for line in text.split("\n")]


def _without_command(line: str) -> str:
    assigned = _ASSIGNED_COMMAND.match(line)
    if assigned:
        return f"{assigned[1]}None"
    code = line.lstrip()
    is_command = code.startswith(("%", "!", "?")) or code.rstrip().endswith("?")
    return line[: len(line) - len(code)] + "pass" if is_command else line
