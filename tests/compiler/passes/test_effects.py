"""What operators do besides computing, read from their schemas: writes, views, random numbers, unknown calls."""

import operator

import pytest
import torch
from torch import fx

from deepseek.compiler.passes.effects import (
    find_line,
    find_root,
    find_written,
    has_effects,
    is_computation,
    is_opaque,
    is_random,
    is_view,
    read_arguments,
)

aten = torch.ops.aten


@pytest.fixture
def graph():
    return fx.Graph()


def call(graph, target, *args, **kwargs):
    return graph.call_function(target, args, kwargs)


def test_a_write_is_seen_wherever_the_schema_has_it(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert find_written(call(graph, aten.add_.Tensor, x, y)) == [x]
    assert find_written(call(graph, aten.add.out, x, x, out=y)) == [y]
    assert find_written(call(graph, aten._foreach_add_.Scalar, [x, y], 1)) == [x, y]
    assert find_written(call(graph, aten.add.Tensor, x, y)) == []


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.view.default, ([4],), True),
        (aten.transpose.int, (0, 1), True),
        (aten.slice.Tensor, (0, 0, 1), True),
        (aten.clone.default, (), False),
        (aten.relu_.default, (), False),
        (aten.sum.default, (), False),
    ],
)
def test_a_view_shares_memory_that_it_leaves_alone(graph, target, args, expected):
    node = call(graph, target, graph.placeholder("x"), *args)
    assert is_view(node) is expected
    assert is_computation(node) is not expected


def test_random_operators_and_unknown_calls_have_effects(graph):
    x = graph.placeholder("x")
    dropout = call(graph, aten.native_dropout.default, x, 0.5, True)
    unknown, size = call(graph, print, x), call(graph, operator.add, x, 1)
    assert is_random(dropout) and not is_random(call(graph, aten.relu.default, x))
    assert is_opaque(unknown) and is_opaque(graph.call_method("relu", (x,))) and not is_opaque(size)
    assert [has_effects(node) for node in (dropout, unknown, size, call(graph, aten.relu_.default, x))] == [
        True,
        True,
        False,
        True,
    ]


def test_a_view_of_a_view_leads_to_what_owns_the_memory(graph):
    x = graph.placeholder("x")
    parts = call(graph, aten.split.Tensor, call(graph, aten.view.default, x, [4]), 2)
    first = call(graph, operator.getitem, parts, 0)
    copied = call(graph, aten.clone.default, first)
    assert find_root(first) is x and find_root(copied) is copied
    assert find_root(call(graph, aten.add_.Tensor, first, 1)) is x


def test_arguments_are_read_by_name_with_their_defaults(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert read_arguments(call(graph, aten.add.Tensor, x, y)) == {"self": x, "other": y, "alpha": 1}
    assert read_arguments(call(graph, aten.add.Tensor, x, y, alpha=3))["alpha"] == 3
    clamp = read_arguments(call(graph, aten.clamp.default, x, None, 6))
    assert (clamp["min"], clamp["max"]) == (None, 6)


def test_the_line_is_the_innermost_of_the_user(graph):
    node = call(graph, aten.relu.default, graph.placeholder("x"))
    node.stack_trace = (
        'File "/home/me/model.py", line 7, in forward\n    y = self.act(x)\n'
        'File "/lib/torch/nn/functional.py", line 9, in relu\n    return torch.relu(input)'
    )
    assert find_line(node) == "/home/me/model.py:7"
    node.stack_trace = None
    assert find_line(node) == node.name
    node.meta["nn_module_stack"] = {"a": ("", object), "b": ("layers.0.act", object)}
    assert find_line(node) == "layers.0.act"
