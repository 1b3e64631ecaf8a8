"""Expressions as calls of the operators: outside of any trace they give what Python gives, in Python's order."""

import ast
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.compiler.jit.rewriting.context import Context, Position, Scope
from deepseek.compiler.jit.rewriting.counterparts import ENTRY
from deepseek.compiler.jit.rewriting.expressions import Expressions, has_star, has_walrus, mangle
from deepseek.compiler.jit.shared_names import SITES_NAME

WORLD = {"math": math, "torch": torch}
BUILTINS = {"range": range, "int": int, "float": float, "bool": bool, "isinstance": isinstance, "min": min, "max": max}


def make_position(variables, *, known=None, class_name=None):
    context = Context(__file__, (WORLD | BUILTINS).get, class_name)
    scope = Scope("f", tuple(variables), frozenset(), {}, frozenset())
    return Position(context, scope, 0, frozenset(variables if known is None else known))


def rewritten(source, *variables, **facts):
    return ast.unparse(Expressions(make_position(variables, **facts)).visit(ast.parse(source, mode="eval").body))


def evaluate(source, variables):
    """What the rewritten expression gives."""
    position = make_position(variables)
    tree = Expressions(position).visit(ast.parse(source, mode="eval").body)
    code = compile(ast.fix_missing_locations(ast.Expression(tree)), __file__, "eval")
    # one dict, since what a lambda reads must be global there
    return eval(code, {**WORLD, **variables, "_ds0": ENTRY, SITES_NAME: tuple(position.context.sites)})


# ---- the values and the order of Python


operands = st.builds(
    "look({!r}, {})".format, st.sampled_from("abcdefgh"), st.sampled_from(["0", "1", "2", "[]", "3.5"])
)
numbers = st.builds("look({!r}, {})".format, st.sampled_from("pqrs"), st.sampled_from(["0", "1", "2", "3.5"]))
expressions = st.recursive(
    st.one_of(operands, st.builds("{} < {} <= {} != {}".format, numbers, numbers, numbers, numbers)),
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {} or {})".format, inner, inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("look('call', {})".format, inner),
        st.builds("[{}, {}][bool({})]".format, inner, inner, inner),
        st.builds("(lambda value: value)({})".format, inner),
    ),
    max_leaves=8,
)


@given(expressions)
def test_a_random_expression_evaluates_what_python_evaluates_in_the_same_order(source):
    looked = []

    def look(name, value):
        looked.append(name)
        return value

    want = eval(source, {"look": look})
    order = looked.copy()
    looked.clear()
    got = evaluate(source, {"look": look})
    assert (got, type(got), looked) == (want, type(want), order)


@pytest.mark.parametrize(
    "source",
    [
        "int(3.7) + float(n) + bool(n)",
        "list(range(1, n))",
        "min(3, n) + max(1, 2, n)",
        "min(items)",
        "isinstance(n, int)",
        "items[n - 2]",
        "items[1:n]",
        "grid[n - 2][0]",
        "text.upper().count('B')",
        "math.sqrt(n) + math.pi",
        "[i * n for i in items if i > 1 and n]",
        "{i: j for i in items for j in range(i) if not j}",
        "{i for i in items if 0 < i < n}",
        "sum(i for i in items)",
        "(lambda a, b=2, *c, d=4, **e: (a, b, c, d, e))(1, *items, d=5, **options)",
        "(last := n + 1) and last",
        "f'{n}: {items[n - 1]}'",
        "(n if n is None else n + 1)",
        "'a' < text < 'c'",
        "1 < n in items",
    ],
)
def test_an_expression_on_python_values_gives_what_python_gives(source):
    variables = {"n": 3, "items": [1, 2, 3, 4], "grid": [[1], [2]], "text": "abba", "options": {"z": 1}}
    assert evaluate(source, variables) == eval(source, {**WORLD, **variables})


@pytest.mark.parametrize(
    "source",
    ["x[i]", "x[i, :]", "x[..., i]", "x.sum().item()", "torch.relu(x).argmax(1)", "x if x.sum() > 0 else -x"],
)
def test_an_expression_on_tensors_gives_what_torch_gives(source):
    variables = {"x": torch.tensor([[1.0, -2.0], [-3.0, 0.5]]), "i": torch.tensor(1)}
    got, want = evaluate(source, variables), eval(source, {**WORLD, **variables})
    torch.testing.assert_close(got, want)


# ---- what becomes of the text


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("f(x)", "_ds0.call(f)(x)"),
        ("x.run(1)", "_ds0.method(x, 'run')(1)"),
        ("math.sqrt(x)", "math.sqrt(x)"),
        ("torch.nn.functional.relu(x)", "torch.nn.functional.relu(x)"),
        ("torch.tensor(x)", "_ds0.tensor(torch.tensor, x)"),
        ("float(x)", "_ds0.to_number('float', x)"),
        ("x[0]", "x[0]"),
        ("x[1:]", "x[1:]"),
        ("x[x, 1:]", "_ds0.get(x, (x, slice(1, None, None)))"),
        ("x is None", "x is None"),
        ("x < 1", "x < 1"),
    ],
)
def test_what_is_called_instead(source, want):
    assert rewritten(source, "x") == want


def test_a_variable_with_the_name_of_a_builtin_or_a_module_is_the_user_s():
    assert rewritten("float(x)", "x", "float") == "_ds0.call(float)(x)"
    assert rewritten("(lambda float: float(x))(1)", "x") == "_ds0.call(_ds0.mark(lambda float: _ds0.call(float)(x)))(1)"
    assert rewritten("math.sqrt(x)", "x", "math") == "_ds0.method(math, 'sqrt')(x)"
    assert rewritten("(lambda math: math.sqrt(x))(1)", "x").count("_ds0.method(math, 'sqrt')(x)") == 1


def test_a_variable_that_may_have_no_value_is_checked_where_it_is_read():
    position = make_position(["x", "y"], known=["x"])
    position.scope.missing.add("y")
    tree = Expressions(position).visit(ast.parse("x + y + (lambda y: y)(1)", mode="eval").body)
    assert ast.unparse(tree).startswith("x + _ds0.check(y, 'y') + ")
    assert ast.unparse(tree).count("check") == 1


def test_a_branch_takes_what_it_reads_as_parameters_and_operators_of_its_own():
    assert rewritten("x if y > 0 else g(z)", "x", "y", "z") == (
        "_ds0.cond(y > 0, lambda _ds1, x, z: x, lambda _ds1, x, z: _ds1.call(g)(z), (x, z), _ds_sites[0])"
    )


def test_sites_name_the_line_and_the_kind():
    position = make_position(["x"])
    source = "(not x and\n (x if x else\n [x for y in x if y]))"
    Expressions(position).visit(ast.parse(source, mode="eval").body)
    found = {(site.kind, site.line) for site in position.context.sites}
    assert found == {("not", 1), ("a condition", 1), ("a conditional expression", 2), ("a comprehension", 3)}


def test_private_names_are_mangled_as_python_mangles_them():
    class _Private:
        names = (lambda: __it, lambda: __it__, lambda: it, lambda: _it)  # noqa: F821 - only their names are looked at

    written = ("__it", "__it__", "it", "_it")
    assert [mangle(name, "_Private") for name in written] == [f.__code__.co_names[0] for f in _Private.names]
    assert [mangle(name, None) for name in written] == list(written)
    assert rewritten("x.__it(1)", "x", class_name="_Private") == "_ds0.method(x, '_Private__it')(1)"


def test_stars_and_walruses_are_found_wherever_they_stand():
    def parse(source):
        return ast.parse(source, mode="eval").body

    assert has_walrus(parse("f(a, [(b := 1)])"))
    assert not has_walrus(parse("f(a, b=1)"))
    assert has_star(parse("(a, *b)"))
    assert not has_star(parse("a * b"))
