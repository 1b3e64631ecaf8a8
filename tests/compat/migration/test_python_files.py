"""Names are followed through imports, places are exact and formatting is kept."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compat.migration.python_files import check_python
from tests.compat.migration.checks import (
    RULES,
    python_findings,
    settle,
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import torch as t\nx = t.cuda.amp.autocast()\n", 'import torch as t\nx = t.amp.autocast("cuda")\n'),
        (
            "from torch.cuda import amp\nx = amp.autocast()\n",
            'import torch.amp\nfrom torch.cuda import amp\nx = torch.amp.autocast("cuda")\n',
        ),
        (
            "from torch.cuda.amp import (\n    autocast,  # a\n    GradScaler,\n)\nx = autocast()\n",
            'from torch.amp import autocast\nfrom torch.amp import GradScaler\nx = autocast("cuda")\n',
        ),
        ("import numpy as np\r\nx = np.float( 3 )\r\n", "import numpy as np\r\nx = float( 3 )\r\n"),
        (
            "from torch import load\nx = load(p,\n    mmap=True,\n)\n",
            "from torch import load\nx = load(p,\n    mmap=True, weights_only=True,\n)\n",
        ),
    ],
)
def test_edits_follow_aliases_and_keep_formatting(before: str, after: str) -> None:
    text = settle(before, python_findings)
    assert text == after
    compile(text, "after", "exec")
    assert settle(text, python_findings) == text


@pytest.mark.parametrize(
    "source",
    [
        "class np:\n    float = 1\nx = np.float\n",
        "x = torch.cuda.amp.autocast()\n",
        "def f(torch):\n    return torch.load(1)\n",
        "# torch.cuda.amp.autocast\ns = 'np.float'\n",
        "import torch\ntorch.load(p, weights_only=False)\n",
    ],
)
def test_what_only_looks_like_a_name_is_left_alone(source: str) -> None:
    assert python_findings(source) == []


def test_places_are_exact() -> None:
    text = "import numpy as np\n\nä = 1; x = [np.float,\n   np.float]\n"
    assert [(each.line, each.column) for each in python_findings(text)] == [(3, 13), (4, 4)]


def test_a_reference_that_is_not_called_is_left_for_a_person() -> None:
    text = "from torch.cuda.amp import autocast\ncontext = autocast\nx = autocast()\n"
    findings = python_findings(text)
    assert findings
    assert not any(each.edits for each in findings)


def test_options_that_may_hold_the_keyword_are_left_for_a_person() -> None:
    (finding,) = python_findings("import torch\ntorch.load(p, **options)\n")
    assert finding.edits == ()


@pytest.mark.parametrize(
    ("content", "line", "why"),
    [
        (b"import numpy as np\nx = (np.float\n", 2, "never closed"),
        (b"x = '\xff'  # np.float\n", 1, "not valid Python"),
        (b"\x00 np.float", 1, "null bytes"),
        (b"x = np.float" + b"+1" * 20_000, 1, "nested too deeply"),
        (b"x = np.float " + b"and a " * 20_000, 1, "nested too deeply"),
        (b"x = np.float, " + b"'' " * 20_000, 1, "nested too deeply"),
        (b"import np.float" + b".a" * 20_000, 1, "nested too deeply"),
    ],
)
def test_broken_source_is_reported_with_its_place(content: bytes, line: int, why: str) -> None:
    (finding,) = check_python(content, "x.py", RULES.python)
    assert (finding.rule, finding.line) == ("unreadable", line)
    assert why in finding.why


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(
            [
                "import numpy as np",
                "np.float",
                "(",
                ")",
                ",",
                "\n",
                "    ",
                "def f",
                ":",
                "=",
                "x",
                '"',
                "with ",
                "torch.load",
                "from torch import load",
                "load(",
                "*",
                "lambda",
            ]
        ),
        max_size=14,
    )
)
def test_no_source_makes_the_python_checker_crash(pieces: list[str]) -> None:
    text = "".join(pieces)
    changed = settle(text, python_findings)
    with contextlib.suppress(SyntaxError, ValueError):
        compile(text, "before", "exec")
        compile(changed, "after", "exec")
