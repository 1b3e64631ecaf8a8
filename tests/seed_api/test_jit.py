"""The row `@deepseek.jit` of the specification: dynamic code to one static graph, and an explanation of it."""

import pytest
import torch
from torch import nn

import deepseek


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_condition_on_a_tensor_becomes_one_graph_with_both_branches():
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    @deepseek.jit(backend=backend)
    def forward(x, y):
        if y.mean() > 0:
            return deepseek.nn.ReLU()(y)
        return deepseek.nn.LeakyReLU(0.1)(y)

    y = torch.tensor([2.0, -1.0])
    assert torch.equal(forward(y, y), torch.tensor([2.0, 0.0]))
    assert torch.equal(forward(y, -y), torch.tensor([-0.2, 1.0]))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_without_options_it_compiles_with_inductor():
    @deepseek.jit
    def forward(y):
        if y.mean() > 0:
            return deepseek.nn.ReLU()(y)
        return deepseek.nn.LeakyReLU(0.1)(y)

    assert torch.equal(forward(torch.tensor([2.0, -1.0])), torch.tensor([2.0, 0.0]))
    assert torch.allclose(forward(torch.tensor([-2.0, 1.0])), torch.tensor([-0.2, 1.0]))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = torch.relu(self.norm(self.convolution(x)))
        while y.mean() > 1:
            y = y / 2
        return y


def test_an_explanation_reports_graphs_breaks_fusions_and_memory():
    block = deepseek.jit(Block().eval(), backend="eager")
    with torch.no_grad():
        explanation = block.explain(torch.randn(1, 3, 8, 8))
    assert explanation.num_graphs == 1
    assert explanation.breaks == ()
    assert [place.text for place in explanation.rewritten] == ["while y.mean() > 1:"]
    assert "convolution + batch norm" in " ".join(explanation.fusions)
    assert explanation.peak_bytes_after <= explanation.peak_bytes_before
    assert "peak memory" in str(explanation)
