"""Names are followed through imports, places are exact and formatting is kept."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compat.migration.findings import apply_edits
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
        (b"x = np.float" + b"[0]" * 200_000, 1, "nested too deeply"),
        (b"x = " + b"(" * 300 + b"np.float" + b")" * 300, 1, "nested too deeply"),
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


@pytest.mark.parametrize("rest", [b"and a " * 20_000, b", " + b"'' " * 20_000, b"; import x" + b".a" * 20_000])
def test_long_flat_source_is_checked_like_any_other(rest: bytes) -> None:
    (finding,) = check_python(b"import numpy as np\nx = np.float " + rest, "x.py", RULES.python)
    assert (finding.rule, finding.line, finding.column) == ("python-numpy-float", 2, 5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Arguments by position, with brackets, comments and trailing commas of their own.
        (
            "from torch.cuda.amp import autocast\nautocast(flag)\n",
            'from torch.amp import autocast\nautocast("cuda", enabled=flag)\n',
        ),
        (
            "from torch.cuda.amp import autocast\nautocast((a), # b (\n  (c), cache_enabled=(d),)\n",
            'from torch.amp import autocast\nautocast("cuda", enabled=(a), # b (\n  dtype=(c), cache_enabled=(d),)\n',
        ),
        ("import torch\ntorch.load((p))\n", "import torch\ntorch.load((p), weights_only=True)\n"),
        ("import torch\n(torch.load)(p # )\n)\n", "import torch\n(torch.load)(p, weights_only=True # )\n)\n"),
        ("import torch\ntorch . load(p)\n", "import torch\ntorch . load(p, weights_only=True)\n"),
        # Two names in one statement, one of them for another module.
        (
            "from torch.cuda.amp import GradScaler, autocast\nGradScaler(); autocast()\n",
            'from torch.amp import GradScaler\nfrom torch.amp import autocast\nGradScaler("cuda"); autocast("cuda")\n',
        ),
        (
            "from numpy import (zeros, product, # c\n  trapz, ones, in1d)\nx = product(1), trapz(2)\n",
            "from numpy import prod as product\nfrom numpy import trapezoid as trapz\n"
            "from numpy import (zeros, ones, in1d)\nx = product(1), trapz(2)\n",
        ),
        (
            "if 1: from numpy import product, ones\n",
            "if 1: from numpy import prod as product; from numpy import ones\n",
        ),
        # Strings inside f-strings, which share no quotes before Python 3.12.
        ('import torch\nf"{torch.cuda.amp.GradScaler()}"\n', "import torch\nf\"{torch.amp.GradScaler('cuda')}\"\n"),
        ("import torch\nf'{torch.cuda.amp.GradScaler()}'\n", "import torch\nf'{torch.amp.GradScaler(\"cuda\")}'\n"),
        # A new import stands after docstring, shebang, coding line and future, with the line end of the file.
        (
            '#!/usr/bin/env python\n"""A.\n\nfrom b import c\n"""\nfrom __future__ import annotations\n'
            "from torch.cuda import amp\namp.autocast()\n",
            '#!/usr/bin/env python\n"""A.\n\nfrom b import c\n"""\nfrom __future__ import annotations\n'
            'import torch.amp\nfrom torch.cuda import amp\ntorch.amp.autocast("cuda")\n',
        ),
        (
            "# c\r\nif 1:\r\n  from torch.cuda import amp\r\n  amp.autocast()\r\n",
            '# c\r\nimport torch.amp\r\nif 1:\r\n  from torch.cuda import amp\r\n  torch.amp.autocast("cuda")\r\n',
        ),
        # Old defaults are named, given ones kept.
        (
            "import transformers\ntransformers.AdamW(p, 1e-3, eps=1e-8)\n",
            "import torch.optim\nimport transformers\ntorch.optim.AdamW(p, 1e-3, eps=1e-8, weight_decay=0.0)\n",
        ),
    ],
)
def test_one_pass_settles_a_file(before: str, after: str) -> None:
    assert apply_edits(before, python_findings(before)) == after
    compile(after, "after", "exec")


@pytest.mark.parametrize(
    "text",
    [
        "from torch.cuda.amp import *\nx = GradScaler()\n",
        "try:\n    from torch.amp import autocast\nexcept ImportError:\n    from torch.cuda.amp import autocast\n"
        "x = autocast()\n",
        "from torch.cuda.amp import autocast\n__all__ = ['autocast']\nx = autocast()\n",
        "from torch.cuda.amp import autocast\nx = autocast(*flags)\n",
        "from torch.cuda.amp import autocast\nx = autocast(y := True)\n",
        "from torch.cuda import amp\nfrom apex import torch\nx = amp.autocast()\n",
        "import numpy as np\nnp.float = float\n",
        "import numpy as np\nfloat = np.float\n",
        "from numpy import float\nx = float(1)\n",
        "import torch\ntorch.load(p, pickle_module=dill)\n",
        "import torch\ntorch.load(p, None, dill)\n",
        "import torch\ntorch.load(*a)\n",
        "import torch\ntorch.load(p for p in q)\n",
        "import torch\nf\"{f'{torch.cuda.amp.GradScaler()}'}\"\n",
        "import torch\ntorch.testing.assert_allclose(a, b)\n",
        "import numpy as np\nnp.in1d(a, b)\n",
        "import transformers\ntransformers.AdamW(p, correct_bias=False)\n",
        "import transformers\ntransformers.AutoModelWithLMHead.from_pretrained('t5')\n",
        "from transformers import TrainingArguments\nTrainingArguments('o', no_cuda=True, use_cpu=False)\n",
    ],
)
def test_what_only_a_person_can_settle_is_found_and_left(text: str) -> None:
    findings = python_findings(text)
    assert findings
    assert apply_edits(text, findings) == text


AUTOCAST = "it is not called here, and its calls take other arguments now"


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("import torch\nAC = torch.cuda.amp.autocast\nAC()\n", ["AC is another name for it", "left with line 2: AC"]),
        (
            "from torch.cuda.amp import autocast\nautocast()\nf(autocast)\n",
            ["left with line 3: ", "left with", AUTOCAST],
        ),
        ("from torch.cuda.amp import autocast\nautocast(*a)\n", ["left with line 2", "a star hides its arguments"]),
        ("import torch\ntorch.load(*a)\n", ["a star hides its arguments"]),
        ("import torch\ntorch.load(p, pickle_module=dill)\n", ["pickle_module cannot be given with it"]),
        (
            "import torch\ntorch.testing.assert_allclose(a, b)\n",
            ["without rtol and atol the new name means something else"],
        ),
        ("import numpy as np\nfloat = np.float\n", ["float is a name of this file"]),
        ("from numpy import float\n", ["float is built in and not imported"]),
        (
            "try:\n    import torch\nexcept ImportError:\n    torch = None\ntorch.load(p)\n",
            ["torch.load may be something else"],
        ),
        ("import torch\nf\"{f'{torch.cuda.amp.GradScaler()}'}\"\n", ["inside an f-string"]),
        (
            "from transformers import TrainingArguments as T\nT('o', no_cuda=True, use_cpu=False)\n",
            ["use_cpu is given, too"],
        ),
        (
            "from torch.cuda.amp import autocast\n__all__ = ['autocast']\n",
            ["other files may import it from here"],
        ),
    ],
)
def test_what_is_left_to_a_person_says_why(text: str, reasons: list[str]) -> None:
    findings = python_findings(text)
    assert [any(finding.edits for finding in findings), len(findings)] == [False, len(reasons)]
    for finding, reason in zip(findings, reasons, strict=True):
        assert reason in finding.why
        assert finding.is_for_person


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "import torch\namp = torch.cuda.amp\nx = amp.autocast(True)\n",
            'import torch.amp\nimport torch\namp = torch.cuda.amp\nx = torch.amp.autocast("cuda", enabled=True)\n',
        ),
        (
            "import torch\ndef f():\n    cast = torch.cuda.amp.autocast\n    return cast(), cast(enabled=x)\n",
            'import torch\ndef f():\n    cast = torch.amp.autocast\n    return cast("cuda"), cast("cuda", enabled=x)\n',
        ),
        ("import numpy as np\nF = np.float\nx = F(1)\n", "import numpy as np\nF = float\nx = F(1)\n"),
        (
            "import torch\nload: object = torch.load\nload(p)\n",
            "import torch\nload: object = torch.load\nload(p, weights_only=True)\n",
        ),
        (
            "from torch.cuda.amp.grad_scaler import GradScaler\nGradScaler()\n",
            'from torch.amp import GradScaler\nGradScaler("cuda")\n',
        ),
        (
            "from torch.cuda.amp import custom_fwd\n@custom_fwd(cast_inputs=t)\ndef f(ctx, x): ...\n",
            'from torch.amp import custom_fwd\n@custom_fwd(cast_inputs=t, device_type="cuda")\ndef f(ctx, x): ...\n',
        ),
        (
            "from torch.cuda.amp import custom_bwd as b\n@staticmethod\n@b\ndef f(ctx, x): ...\ng = b(f)\n",
            "from torch.amp import custom_bwd as b\n@staticmethod\n"
            '@b(device_type="cuda")\ndef f(ctx, x): ...\ng = b(f, device_type="cuda")\n',
        ),
    ],
)
def test_names_given_by_assignment_and_bare_decorators_are_rewritten(before: str, after: str) -> None:
    assert settle(before, python_findings) == after


def test_functions_with_the_rewritten_decorators_have_the_same_gradients() -> None:
    before = (
        "import torch\nfrom torch.cuda.amp import custom_bwd, custom_fwd\n\n"
        "class Square(torch.autograd.Function):\n"
        "    @staticmethod\n    @custom_fwd(cast_inputs=torch.float32)\n"
        "    def forward(ctx, x):\n        ctx.save_for_backward(x)\n        return x * x\n\n"
        "    @staticmethod\n    @custom_bwd\n"
        "    def backward(ctx, g):\n        (x,) = ctx.saved_tensors\n        return 2 * x * g\n"
    )
    space: dict[str, Any] = {}
    exec(
        compile(settle(before, python_findings), "edited", "exec"), space
    )  # warnings of deprecated names are errors here
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    space["Square"].apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, -4.0]
