# ruff: noqa: SIM108 - the statements are the subject
"""The graphs that reach a backend: each branch once, nothing that was only looked at."""

import pytest
import torch
from torch._dynamo.utils import counters

from deepseek.compiler.jit.decorator import ControlFlowError, jit
from deepseek.compiler.passes.placement import devices
from deepseek.compiler.passes.placement.assignment import Link
from deepseek.core.errors import ConfigError


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


def test_several_devices_are_measured_for_inference_and_explained(monkeypatch):
    monkeypatch.setattr(devices, "measure_link", lambda *_: Link(1e3, 1.0))  # nothing comes back from meta in time
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).eval()
    compiled, x = jit(model, backend="eager", devices=("cpu", "meta")), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        explanation = compiled.explain(x)
        assert "cpu alone" in explanation.placements[0] and "devices: " in str(explanation)
        assert jit(model, backend="eager").explain(x).placements == ()
    compiled(x).sum().backward()  # gradients flow where the graph is left where it was
    assert compiled.explain(x).placements == ()


def test_the_devices_that_are_present_are_found():
    model, x = torch.nn.Linear(8, 4).eval(), torch.randn(3, 8)
    compiled = jit(model, backend="eager", devices="present")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        placements = compiled.explain(x).placements
    if torch.cuda.is_available():
        assert len(placements) == 1
    else:
        assert placements == ()  # one device alone is nothing to choose from


def test_a_function_without_parameters_is_placed_as_well():
    compiled = jit(affine, backend="eager", devices=("cpu", "cpu:0"))
    with torch.no_grad():
        assert compiled.explain(torch.ones(3)).placements == ("everything on cpu, the only device given",)
        assert compiled(torch.ones(3)).tolist() == [3.0] * 3


def affine(x):
    return x * 2 + 1


def test_one_name_is_not_several_devices():
    with pytest.raises(ConfigError, match="devices='cuda' is one name; give several"):
        jit(affine, devices="cuda")


class Critic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 8), torch.nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.first(x)
        hidden = torch.sigmoid(hidden) if hidden.mean() > 10 else torch.tanh(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_of_gradients_through_a_branch_are_refused_and_first_ones_are_not(backend):
    critic = Critic()
    compiled = jit(critic, backend=backend)
    x = torch.randn(4, 3, requires_grad=True)
    got, want = (torch.autograd.grad(module(x).sum(), x)[0] for module in (compiled, critic))
    torch.testing.assert_close(got, want)
    with pytest.raises(ControlFlowError, match=r"create_graph=True .* without ds.jit"):
        torch.autograd.grad(compiled(x).sum(), x, create_graph=True)


def test_graphs_without_control_flow_have_gradients_of_gradients():
    def cube(x):
        return x**3

    x = torch.tensor(2.0, requires_grad=True)
    (first,) = torch.autograd.grad(jit(cube, backend="eager")(x), x, create_graph=True)
    assert torch.autograd.grad(first, x)[0] == 12.0


def sine_of_matmul(x, weight):
    return torch.sin(x @ weight).sum()


@pytest.mark.parametrize("memory_budget", [None, 0.5])
@pytest.mark.parametrize("is_training", [False, True])
def test_cuda_graphs_are_asked_of_inductor(is_training, memory_budget):
    x, weight = torch.randn(4, 8), torch.randn(8, 8, requires_grad=is_training)
    compiled = jit(sine_of_matmul, options={"triton.cudagraphs": True}, memory_budget=memory_budget)
    counters["inductor"].clear()
    torch.testing.assert_close(compiled(x, weight), sine_of_matmul(x, weight))
    # Where there is no CUDA inductor counts the graphs that it was asked to record and did not.
    assert counters["inductor"]["cudagraph_skips"] > 0


def test_a_backend_that_is_a_function_gets_its_options():
    seen = []

    def backend(graph_module, inputs, options=None):
        seen.append(options)
        return graph_module.forward

    jit(sine_of_matmul, backend=backend, options={"level": 3})(torch.ones(2, 2), torch.ones(2, 2))
    assert seen == [{"level": 3}]


def test_options_that_a_backend_does_not_read_are_refused():
    with pytest.raises(ConfigError, match=r"options were given with the backend 'eager', which reads none"):
        jit(sine_of_matmul, backend="eager", options={"triton.cudagraphs": True})
