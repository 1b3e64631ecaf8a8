"""Cells share their names, commands are no Python, and findings say which cell."""

from __future__ import annotations

import json

import pytest

from deepseek.compat.migration.notebooks import check_notebook
from tests.compat.migration.checks import RULES


def notebook(*cells: str | list[str], kind: str = "code") -> bytes:
    return json.dumps({"cells": [{"cell_type": kind, "source": cell} for cell in cells], "nbformat": 4}).encode()


def test_a_name_imported_in_one_cell_is_known_in_the_next() -> None:
    content = notebook("%matplotlib inline\nimport numpy as np", ["!pip list\n", "y = 1\n", "x = np.float(y)"])
    (finding,) = check_notebook(content, "a.ipynb", RULES.python)
    assert (finding.rule, finding.line, finding.column, finding.edits) == ("python-numpy-float", 3, 5, ())
    assert "cell 2" in finding.why


@pytest.mark.parametrize(
    "command", ["files = !ls -l", "a, b = %sql select 1", "    x.y = !date", "t = %timeit -o f(x)"]
)
def test_what_a_command_gives_to_a_name_hides_no_other_cell(command: str) -> None:
    indented = f"if True:\n{command}" if command.startswith(" ") else command
    content = notebook(indented, "import numpy as np\nx = np.float(5 %3)\nprint('a = %d' % 3, x != 4)")
    assert [finding.rule for finding in check_notebook(content, "a.ipynb", RULES.python)] == ["python-numpy-float"]


def test_text_and_other_languages_are_no_python() -> None:
    assert check_notebook(notebook("import numpy as np; np.float", kind="markdown"), "a.ipynb", RULES.python) == []
    assert check_notebook(notebook("%%bash\nimport numpy as np; np.float"), "a.ipynb", RULES.python) == []


@pytest.mark.parametrize("content", [b"", b"[]", b'{"cells": 3}', b'{"cells": [3]}', b"[" * 100_000])
def test_what_is_no_notebook_is_reported(content: bytes) -> None:
    (finding,) = check_notebook(content, "a.ipynb", RULES.python)
    assert finding.rule == "unreadable"


def test_worksheets_of_older_notebooks_are_read() -> None:
    cells = [{"cell_type": "code", "input": "import numpy as np"}, {"cell_type": "code", "input": ["x = np.float"]}]
    content = json.dumps({"worksheets": [{"cells": cells}], "nbformat": 3}).encode()
    (finding,) = check_notebook(content, "a.ipynb", RULES.python)
    assert (finding.rule, finding.line) == ("python-numpy-float", 1)
    assert "cell 2" in finding.why
