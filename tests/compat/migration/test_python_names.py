"""Names mean what libcst, which knows the whole language, says that they mean."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from types import ModuleType

import libcst
import pytest
import torch.nn.utils.clip_grad
import torch.serialization
import torch.utils.data.dataloader
from libcst.metadata import (
    ExpressionContext,
    ExpressionContextProvider,
    MetadataWrapper,
    PositionProvider,
    QualifiedNameProvider,
    QualifiedNameSource,
)

from deepseek.compat.migration.python_names import children, find_names


def names_by_libcst(text: str, wanted: frozenset[str]) -> set[tuple[int, int, str]]:
    """Line, column and full name of every use that comes through an import."""
    wrapper = MetadataWrapper(libcst.parse_module(text))
    qualified, positions = wrapper.resolve(QualifiedNameProvider), wrapper.resolve(PositionProvider)
    contexts = wrapper.resolve(ExpressionContextProvider)
    found, pending = set(), [wrapper.module]
    while pending:
        node = pending.pop()
        if isinstance(node, libcst.Import | libcst.ImportFrom):
            continue
        if isinstance(node, libcst.Attribute | libcst.Name) and contexts.get(node) == ExpressionContext.LOAD:
            names = qualified.get(node, ())
            for name in names() if callable(names) else names:
                if name.source == QualifiedNameSource.IMPORT and name.name in wanted:
                    found.add((positions[node].start.line, positions[node].start.column, name.name))
        pending += [node.value] if isinstance(node, libcst.Attribute) else list(node.children)
    return found


def names_by_us(text: str, wanted: frozenset[str]) -> set[tuple[int, int, str]]:
    return {(use.node.lineno, use.node.col_offset, use.name) for use in find_names(ast.parse(text), wanted).uses}


@pytest.mark.parametrize("module", [torch.nn.utils.clip_grad, torch.serialization, torch.utils.data.dataloader])
def test_real_modules_use_the_names_that_libcst_finds(module: ModuleType) -> None:
    text = inspect.getsource(module)
    if not text.isascii():  # their columns count characters, ours bytes
        text = text.encode("ascii", "replace").decode()
    wanted = frozenset(
        [
            "torch.Tensor",
            "torch.load",
            "torch.save",
            "torch.device",
            "torch.norm",
            "torch.dtype",
            "typing.Any",
            "os.path.join",
            "os.PathLike",
            "functools.wraps",
            "warnings.warn",
            "typing_extensions.deprecated",
            "io.BytesIO",
        ]
    )
    expected = names_by_libcst(text, wanted)
    assert len(expected) > 3
    assert names_by_us(text, wanted) == expected


def test_a_name_with_two_meanings_is_not_certain() -> None:
    text = "try:\n    from a import f\nexcept ImportError:\n    from b import f\nf()\n"
    uses = find_names(ast.parse(text), frozenset(["a.f", "b.f"])).uses
    assert {(use.name, use.is_certain) for use in uses} == {("a.f", False), ("b.f", False)}


@pytest.mark.parametrize(
    ("text", "num_uses"),
    [
        ("import numpy as np\ndef f():\n    np.float\n    del np\n", 0),
        ("import numpy as np\ndef f():\n    global np\n    np.float\n", 1),
        ("def f():\n    import numpy as np\n    def g():\n        nonlocal np\n        return np.float\n", 1),
        ("def f():\n    return np.float\nimport numpy as np\n", 1),
        ("import numpy as np\nmatch x:\n    case {'a': 1, **np}: np.float\n", 1),
        ("import numpy as np\nclass A:\n    np = 1\n    def f(self): return np.float\n", 1),
        ("import numpy as np\nclass A:\n    np = 1\n    x = np.float\n", 0),
        ("from .numpy import float\nx = float\n", 0),
    ],
)
def test_scopes_follow_the_language(text: str, num_uses: int) -> None:
    compile(text, "text", "exec")
    assert len(find_names(ast.parse(text), frozenset(["numpy.float"])).uses) == num_uses


def test_a_target_in_a_comprehension_belongs_to_the_function_around() -> None:
    text = "import numpy as np\ndef f(x):\n    [np := y for y in x]\n    return np.float\n"
    assert find_names(ast.parse(text), frozenset(["numpy.float"])).uses == []


def test_children_are_those_of_the_compiler_without_its_marks() -> None:
    marks = (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)
    for module in (ast, inspect, textwrap, typing):
        tree = ast.parse(inspect.getsource(module))
        for node in ast.walk(tree):
            expected = [child for child in ast.iter_child_nodes(node) if not isinstance(child, marks)]
            assert children(node) == expected
