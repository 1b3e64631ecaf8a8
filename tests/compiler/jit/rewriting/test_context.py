"""What the rewriting knows where it stands."""

import ast

from deepseek.compiler.jit.rewriting.context import Context, Position, Scope


def make_position(known, resolve=lambda name: None):
    scope = Scope("f", ("x",), frozenset({"y", "kept"}), {}, frozenset({"kept"}))
    return Position(Context("file.py", resolve), scope, 0, frozenset(known))


def test_a_part_one_level_deeper_has_operators_of_its_own():
    position = make_position("x")
    assert position.operators == "_ds0"
    assert position.deeper().operators == "_ds1"
    assert position.deeper(frozenset("y")).known == {"y"}
    assert position.knowing(frozenset("y")).known == {"x", "y"}


def test_read_only_variables_are_those_with_a_value_that_nobody_else_writes():
    nodes = ast.parse("z = x + y + kept + elsewhere").body
    assert make_position("x").read_only(nodes, frozenset()) == {"x"}
    assert make_position(["x", "y", "kept"]).read_only(nodes, frozenset("x")) == {"y"}


def test_a_name_is_python_s_own_if_nothing_hides_it():
    assert make_position("", resolve={"len": len}.get).context.is_builtin("len")
    assert not make_position("", resolve={"len": max}.get).context.is_builtin("len")


def test_a_site_is_found_by_its_index_when_the_code_runs():
    position = make_position("")
    node = ast.parse("\n\nif x: pass").body[0]
    position.site(node, "if")
    expression = position.site(node, "while", names=("x",))
    assert ast.unparse(expression) == "_ds_sites[1]"
    assert [(site.kind, site.line, site.names) for site in position.context.sites] == [
        ("if", 3, None),
        ("while", 3, ("x",)),
    ]
