"""Which variables a piece of a function reads, writes, needs, and surely has."""

import ast
import textwrap

import pytest

from deepseek.compiler.jit.rewriting.variables import live_before, never_ends, reads, surely_written, writes


def block(source):
    return ast.parse(textwrap.dedent(source)).body


def expression(source):
    return ast.parse(source, mode="eval").body


@pytest.mark.parametrize(
    ("source", "after", "live"),
    [
        ("y = x", {"y"}, {"x"}),
        ("y = x\nx = 1", {"x", "y"}, {"x"}),
        ("x += y", {"x"}, {"x", "y"}),
        ("if c:\n    y = a\nelse:\n    y = b", {"y"}, {"a", "b", "c"}),
        ("if c:\n    y = a", {"y"}, {"a", "c", "y"}),
        ("while c:\n    y = x\n    x = y + z", {"x"}, {"c", "x", "z"}),
        ("for i in n:\n    t = i\n    s = s + t", {"s"}, {"n", "s"}),
        ("for i in n:\n    last = i", {"last"}, {"last", "n"}),
        ("return x\ny = z", {"y"}, {"x"}),
        ("def f(a):\n    return a + k", {"f"}, {"a", "k"}),
        ("x[i] = v", {"x"}, {"i", "v", "x"}),
        ("with m as h:\n    y = h", {"y"}, {"m"}),
        ("try:\n    y = a\nexcept E:\n    y = b", {"y"}, {"E", "a", "b", "y"}),
        ("y = [a for a in b if a > c]", {"y"}, {"a", "b", "c"}),
        ("y: int", {"y"}, {"y", "int"}),
    ],
)
def test_live_variables_are_those_read_before_they_are_written(source, after, live):
    assert live_before(block(source), frozenset(after)) == live


def test_a_native_loop_carries_what_its_jumps_lead_to():
    body = block("if c:\n    break\nx = 1")
    assert live_before(body, frozenset(), head=frozenset("h"), end=frozenset("e")) == {"c", "e"}


def test_what_surely_has_a_value():
    assert surely_written(block("if c:\n    x = y = 1\nelse:\n    x = 2")) == {"x"}
    assert surely_written(block("if c:\n    x = 1\nelse:\n    return 2")) == {"x"}
    assert surely_written(block("while c:\n    x = 1")) == set()
    assert surely_written(block("with a as b:\n    x = 1")) == {"b", "x"}


def test_reads_and_writes_see_scopes():
    assert writes(block("(a, [b, *c]), d.e, f[g] = h\n[q for q in r]\nimport os.path\ndef s(t): u = 1")) == {
        *("a", "b", "c", "os", "s")
    }
    assert reads(expression("[x for x in y if z]")) == {"x", "y", "z"}
    assert writes(expression("[(w := x) for x in y]")) == {"w"}


def test_where_no_statement_goes_on():
    assert never_ends(block("if c:\n    return\nelse:\n    raise E"))
    assert not never_ends(block("if c:\n    return"))
