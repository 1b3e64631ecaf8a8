"""Small syntax trees: each is what Python's own parser gives for the same text, and compiles."""

import ast

import pytest

from deepseek.compiler.jit.rewriting.trees import (
    arguments_of,
    assign,
    assign_constant,
    at,
    attribute,
    call,
    class_of,
    constant,
    function_of,
    keyword_of,
    load,
    store,
    thunk,
    tuple_of,
)

WHERE = ast.parse("\n\n    \nif x: pass").body[0]  # on line 4
RETURN = ast.Return(tuple_of(["a", "b"]))
EXPRESSIONS = {
    "name": load("name"),
    "operators.field": attribute("operators", "field"),
    "operators.get(x, 1)": call("operators", "get", load("x"), constant(1)),
    "()": tuple_of([]),
    "(x,)": tuple_of(["x"]),
    "(x, y)": tuple_of(["x", "y"]),
    "lambda: x": thunk(load("x")),
    "f(a=x, **y)": ast.Call(load("f"), [], [keyword_of("a", load("x")), keyword_of(None, load("y"))]),
    "None": constant(None),
}
STATEMENTS = {
    "x = True": assign_constant("x", True),
    "x = y.z": assign("x", attribute("y", "z"), WHERE),
    "def f(a, b): return (a, b)": function_of("f", arguments_of(["a", "b"]), [RETURN]),
    "def f(): pass": function_of("f", arguments_of([]), [ast.Pass()]),
    "class C: x = False": class_of("C", [assign_constant("x", False)]),
    "for x in y: pass": ast.For(store("x"), load("y"), [ast.Pass()], []),
}


@pytest.mark.parametrize("source", EXPRESSIONS)
def test_an_expression_is_the_one_that_python_parses(source):
    tree = EXPRESSIONS[source]
    assert ast.dump(tree) == ast.dump(ast.parse(source, mode="eval").body)
    compile(ast.fix_missing_locations(ast.Expression(tree)), "file.py", "eval")


@pytest.mark.parametrize("source", STATEMENTS)
def test_a_statement_is_the_one_that_python_parses(source):
    tree = STATEMENTS[source]
    assert ast.dump(tree) == ast.dump(ast.parse(source).body[0])
    compile(ast.fix_missing_locations(ast.Module([tree], [])), "file.py", "exec")


def test_a_tuple_of_texts_is_one_constant_of_the_code():
    code = compile(ast.fix_missing_locations(ast.Expression(constant(("Lt", "Gt")))), "file.py", "eval")
    assert eval(code) == ("Lt", "Gt")


def test_what_is_new_has_the_place_of_what_it_stands_for():
    made = at(ast.Expr(call("operators", "check", load("x"))), WHERE)
    assert {node.lineno for node in ast.walk(made) if isinstance(node, (ast.expr, ast.stmt))} == {4}
    assert assign("x", load("y"), WHERE).lineno == 4


def test_what_has_a_place_of_its_own_keeps_it():
    own = ast.parse("\n" * 8 + "y", mode="exec").body[0].value  # on line 9
    made = at(ast.Expr(ast.Call(load("f"), [own], [])), WHERE)
    assert (made.lineno, made.value.func.lineno, own.lineno) == (4, 4, 9)
