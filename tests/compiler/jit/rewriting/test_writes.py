"""Writes into what variables hold, as assignments."""

import ast
import textwrap

import pytest

from deepseek.compiler.jit.rewriting.writes import is_plain_counter, name_writes, parameters_of


def rewritten(source):
    (tree,) = ast.parse("def f(x, *rest, key=None, **options):\n" + textwrap.indent(source, "    ")).body
    return "\n".join(ast.unparse(statement) for statement in name_writes(tree))


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("x[0] = 1", "x = _ds_set(x, (0,), 1)"),
        ("x[0][key] = 1", "x = _ds_set(x, (0, key), 1)"),
        ("x[0] += y", "x = _ds_augment_item(x, (0,), 'Add', y)"),
        ("x[0].append(y)", "x = _ds_change(x, (0,), 'append', y)"),
        ("out = []\nout.append(x)", "out = []\nout = _ds_change(out, (), 'append', x)"),
        ("x.add_(1, alpha=2)", "x = _ds_change(x, (), 'add_', 1, alpha=2)"),
        ("x.__init__(1)", "x.__init__(1)"),
        ("elsewhere.append(1)", "elsewhere.append(1)"),
        ("x.a[0] = 1", "x.a[0] = 1"),
        ("x = y = 1", "x = y = 1"),
        ("global g\ng[0] = 1", "global g\ng[0] = 1"),
    ],
)
def test_a_write_into_a_local_variable_s_value_assigns_the_variable(source, want):
    assert rewritten(source) == want


def test_what_an_inner_function_reads_is_left_alone():
    source = "out = []\ndef inner():\n    return out\nout.append(x)"
    assert rewritten(source).endswith("out.append(x)")


def test_a_plain_counter_is_only_calculated_with():
    (plain,) = ast.parse("for i in n:\n    x = x + i * 2").body
    (index,) = ast.parse("for i in n:\n    x = y[i] + i").body
    assert is_plain_counter(plain)
    assert not is_plain_counter(index)


def test_names_of_parameters():
    (tree,) = ast.parse("def f(a, /, b, *c, d, **e): pass").body
    assert parameters_of(tree) == ("a", "b", "d", "c", "e")
