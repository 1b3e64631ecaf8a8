# ruff: noqa: SIM108 - the statements are the subject
"""The graphs that reach a backend: each branch once, nothing that was only looked at."""

import pytest
import torch

from deepseek.compiler.jit.decorator import jit


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recording:
    """An eager backend that keeps the graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, inputs):
        self.graphs.append(graph_module)
        return graph_module.forward

    def targets(self):
        (graph,) = self.graphs
        return [str(node.target) for module in graph.modules() for node in module.graph.nodes]


def test_each_branch_stands_in_the_graph_once():
    def f(x):
        if x.sum() > 0:
            if x.max() > 2:
                y = x.exp()
            else:
                y = x.sinh()
        else:
            y = x.cos()
        return y

    backend = Recording()
    with torch.no_grad():
        jit(f, backend=backend)(torch.ones(3))
    for name in ("exp", "sinh", "cos"):
        assert backend.targets().count(name) == 1


def test_a_loop_in_inference_stands_in_the_graph_once():
    def f(x):
        while x.norm() < 10:
            x = x.cosh()
        return x

    backend = Recording()
    with torch.no_grad():
        jit(f, backend=backend)(torch.ones(3))
    assert backend.targets().count("cosh") == 1


def test_what_neither_branch_touches_does_not_pass_through_the_condition():
    def f(x, big):
        y, kept = x, big
        if x.sum() > 0:
            y, kept = x * 2, big
        return y, kept

    backend = Recording()
    with torch.no_grad():
        x, big = torch.ones(3), torch.ones(100)
        assert jit(f, backend=backend)(x, big)[1] is big
    (condition,) = (
        node for node in backend.graphs[0].graph.nodes if "cond" in str(node.target) and node.op != "get_attr"
    )
    assert len(condition.users) == 1
