"""Jumps become structure: which conditions and loops stay Python, and where what follows a jump goes."""

import ast
import textwrap

import pytest

from deepseek.compiler.jit.rewriting.lowering import is_python, lower, stays_native
from deepseek.core.errors import ConfigError


def block(source):
    return ast.parse(textwrap.dedent(source)).body


def expression(source):
    return ast.parse(source, mode="eval").body


@pytest.mark.parametrize(
    "source", ["x is None", "isinstance(x, int)", "not self.training", "len(x) > 'a'", "mode == 'a'"]
)
def test_conditions_that_are_python_for_certain(source):
    assert is_python(expression(source))


@pytest.mark.parametrize("source", ["x", "x > 0", "x is None or y > 0", "x in y", "f(x)", "self.flag"])
def test_conditions_that_may_be_tensors(source):
    assert not is_python(expression(source))


@pytest.mark.parametrize(
    ("source", "native"),
    [
        ("for i in range(3):\n    x = x + i", True),
        ("for i in range(n):\n    x = x + i", False),
        ("for a, b in zip(u, w):\n    x = a", True),
        ("for i in range(3):\n    if x > 0:\n        break", False),
        ("for i in range(3):\n    if x is None:\n        break", True),
        ("while True:\n    if x > 0:\n        break", False),
        ("while x > 0:\n    with m:\n        break", True),
    ],
)
def test_which_loops_stay_python(source, native):
    (loop,) = block(source)
    assert stays_native(loop) is native


def test_what_follows_an_early_return_moves_into_the_other_branch():
    lowered, _ = lower(block("if c:\n    return 1\ny = 2\nreturn y"), "here")
    assert ast.unparse(lowered[0]) == "if c:\n    return 1\nelse:\n    y = 2\n    return y"


def test_a_function_that_may_run_to_its_end_returns_none():
    lowered, _ = lower(block("if c:\n    return 1\ny = 2"), "here")
    assert ast.unparse(lowered[0]).endswith("y = 2\n    return None")


def test_too_many_early_exits_are_refused():
    exits = "\n".join(
        f"if a{k}:\n    if b{k}:\n        return {k}\n    x = {k}\nelse:\n    x = -{k}" for k in range(12)
    )
    with pytest.raises(ConfigError, match="too many early exits"):
        lower(block(exits), "here")
