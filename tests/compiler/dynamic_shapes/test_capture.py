"""Backends by name, settings that are put back, and a description that changes with the code and with nothing else."""

import pytest
import torch
from torch import nn

from deepseek.compiler.dynamic_shapes.capture import compiling, describe_code, find_backend
from deepseek.compiler.dynamic_shapes.codegen import compile_graph
from deepseek.compiler.dynamic_shapes.options import DynamicOptions
from deepseek.core.errors import ConfigError


def test_a_backend_is_found_by_name_or_taken_as_it_is():
    def own(graph, inputs):
        return graph.forward

    assert find_backend(own) is own
    assert find_backend("inductor") is compile_graph
    graph = torch.fx.symbolic_trace(nn.ReLU())
    assert find_backend("eager")(graph, [torch.ones(1)])(torch.tensor([-1.0])).item() == 0.0
    with pytest.raises(ConfigError, match="unknown backend 'eagr'; did you mean 'eager'"):
        find_backend("eagr")


def test_inside_torch_compiles_at_least_as_often_as_the_bound_and_afterwards_as_before():
    before = torch._dynamo.config.recompile_limit
    with pytest.raises(ZeroDivisionError), compiling(DynamicOptions(max_compilations=50)):
        assert torch._dynamo.config.recompile_limit >= 50
        raise ZeroDivisionError
    assert torch._dynamo.config.recompile_limit == before


def test_sizes_that_happen_to_be_equal_are_not_taken_for_one():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: (x + 1, y + 1), backend=backend, dynamic=False)
    for sizes in ((4, 4), (5, 7), (9, 9)):
        x, y = (torch.ones(size) for size in sizes)
        for tensor in (x, y):
            torch._dynamo.mark_dynamic(tensor, 0)
        with compiling(DynamicOptions()):
            assert [each.sum().item() for each in compiled(x, y)] == [2.0 * size for size in sizes]
    assert len(graphs) == 1


def build_source(text):
    names = {}
    exec(compile(text, "somewhere", "exec"), names)
    return names["f"]


def test_a_function_is_described_by_what_it_does_and_not_by_where_it_stands():
    one, moved = build_source("def f(x):\n return x + 1"), build_source("\n\n\ndef f(x):\n return x + 1")
    assert describe_code(one, None) == describe_code(moved, None)
    for other in ("def f(x):\n return x + 2", "def f(x):\n return x - 1", "def f(x):\n return abs(x) + 1"):
        assert describe_code(build_source(other), None) != describe_code(one, None)
    inner = [build_source(f"def f(x):\n def g(y):\n  return y * {factor}\n return g(x)") for factor in (2, 2, 3)]
    assert describe_code(inner[0], None) == describe_code(inner[1], None) != describe_code(inner[2], None)


def test_a_module_is_described_by_its_structure_settings_and_classes():
    def describe(module):
        return describe_code(module.forward, module)

    class Other(nn.Tanh):
        def forward(self, x):
            return super().forward(x) + 1

    base = describe(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
    assert describe(nn.Sequential(nn.Linear(2, 3), nn.Tanh())) == base
    for other in (
        nn.Sequential(nn.Linear(2, 4), nn.Tanh()),
        nn.Sequential(nn.Linear(2, 3), nn.Sigmoid()),
        nn.Sequential(nn.Linear(2, 3), Other()),
        nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double(),
        nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh()),
    ):
        assert describe(other) != base
