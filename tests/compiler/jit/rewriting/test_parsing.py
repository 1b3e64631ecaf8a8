"""From a function to its tree and back: the lines, cells, defaults and names of the user's own function."""

import ast
import importlib.util
import inspect
import textwrap

import pytest

import deepseek as ds
from deepseek.compiler.jit.rewriting.parsing import compile_function, describe, is_same_code, read
from deepseek.core.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    """Import a text as a module in a file, and give its `f`."""

    def load_text(text, name="written_for_a_test"):
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.f

    return load_text


def compiled_again(function, **extra):
    source = read(function)
    source.tree.decorator_list = []
    return compile_function(source.tree, function, source, extra)


# ---- the source


def test_the_tree_has_the_lines_of_the_file():
    def f(x):
        y = x
        return y, x

    lines, first = inspect.getsourcelines(f)
    source = read(f)
    assert (source.file, source.tree.name, source.class_name) == (__file__, "f", None)
    assert [statement.lineno for statement in source.tree.body] == [first + 1, first + 2]
    file_lines = inspect.getsource(inspect.getmodule(f)).splitlines()
    assert file_lines[source.tree.body[0].lineno - 1].strip() == ast.unparse(source.tree.body[0]) == lines[1].strip()


def test_a_decorated_function_is_the_wrapper_that_runs():
    def decorate(function):
        def wrapper(x):
            return function(x) + 1

        wrapper.__wrapped__ = function
        return wrapper

    @decorate
    def f(x):
        return x

    assert read(f).tree.name == "wrapper"


def test_a_function_without_source_is_refused():
    scope = {}
    exec("def f(x):\n    return x", scope)
    with pytest.raises(ConfigError, match=r"source of f .* cannot be found"):
        ds.jit(scope["f"])


def test_a_file_that_was_edited_after_its_import_is_refused(tmp_path):
    path = tmp_path / "edited_after_import.py"
    path.write_text("def f(x):\n    return x + 1\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path.write_text("def f(x):\n    return x - 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="changed after it was imported"):
        ds.jit(module.f)


def test_a_file_with_nothing_but_another_comment_is_still_the_source(load, tmp_path):
    f = load("def f(x):\n    # one\n    return x + 1\n")
    (tmp_path / "written_for_a_test.py").write_text("def f(x):\n    # another\n    return x + 1\n", encoding="utf-8")
    assert ast.unparse(read(f).tree) == "def f(x):\n    return x + 1"


def test_a_function_is_described_with_its_place():
    def f():
        pass

    assert describe(f) == f"{f.__qualname__} ({__file__}:{f.__code__.co_firstlineno})"
    assert describe(len) == "len"
    assert describe(1) == "int"


# ---- code that does the same


def code_of(text):
    scope = {}
    exec(text, scope)
    return scope["f"].__code__


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("def f(x): return x + 1", "def f(x):\n\n    return (x + 1)  # one more", True),
        ("def f(x): return x + 1", "def f(x): return x - 1", False),
        ("def f(x): return x + 1", "def f(x): return x + 2", False),
        ("def f(x): return x.a()", "def f(x): return x.b()", False),
        ("def f(x): return lambda: x + 1", "def f(x): return lambda: x + 2", False),
        ("def f(x):\n    if x: return 1", "def f(x):\n    if not x: return 1", False),
        ("def f(x): return [i for i in x]", "def f(x): return [i for i in x if i]", False),
    ],
)
def test_code_is_the_same_if_its_steps_are(one, other, is_same):
    assert is_same_code(code_of(one), code_of(other)) is is_same


# ---- back to code


def test_a_function_compiled_again_shares_cells_defaults_and_globals():
    gain = 2
    calls = 0

    def f(x: int, y=3, *rest, z=4, **options):
        """Say something."""
        nonlocal calls
        calls += 1
        return x * gain + y + z, rest, options

    again = compiled_again(f)
    assert again(1, 2, 9, z=5, k=6) == (9, (9,), {"k": 6})
    assert again(1) == f(1)
    gain = 100
    assert again(1) == f(1) == (107, (), {})
    assert calls == 5
    assert again.__globals__ is globals()
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__"):
        assert getattr(again, name) == getattr(f, name)
    assert again.__code__.co_filename == f.__code__.co_filename
    assert {line for _, _, line in again.__code__.co_lines()} <= {line for _, _, line in f.__code__.co_lines()}


def test_a_recursive_function_finds_itself_and_not_the_new_one():
    def f(n):
        return n if n < 1 else f(n - 1) + 1

    again, first = compiled_again(f), f
    f = lambda n: 100  # noqa: E731 - what the cell holds now
    assert again(3) == first(3) == 101


def test_new_code_finds_values_under_names_of_its_own():
    def f(x):
        return x

    source = read(f)
    source.tree.body = ast.parse("return (x, hidden)").body
    assert compile_function(source.tree, f, source, {"hidden": 7})(1) == (1, 7)


class _Owner:
    def __init__(self):
        self.__secret = 5

    def read_secret(self):
        return self.__secret, __class__


def test_a_method_finds_private_names_and_its_class():
    assert read(_Owner.read_secret).class_name == "_Owner"
    assert compiled_again(_Owner.read_secret)(_Owner()) == (5, _Owner)


def test_what_a_file_imports_from_the_future_holds_in_the_new_code(load):
    text = """
        def f():
            def inner(x: undefined_name) -> 1 + 1:
                return x
            return inner.__annotations__
    """
    with_future = load("from __future__ import annotations\n" + textwrap.dedent(text))
    assert compiled_again(with_future)() == with_future() == {"x": "undefined_name", "return": "1 + 1"}
    without_future = load(text.replace(": undefined_name", ""), "without_future")
    assert compiled_again(without_future)() == without_future() == {"return": 2}
