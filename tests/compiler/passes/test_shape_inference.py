"""What nodes produce is found without computing, or by running on copies where it depends on data."""

import pytest
import torch
from torch import nn

from deepseek.compiler.passes.memory.peak import lower_peak, predict_peak_bytes
from deepseek.compiler.passes.shape_inference import observe, stand_in
from deepseek.core.errors import ConfigError


def capture(model, x):
    with torch.no_grad():
        return torch.export.export(model.eval(), (x,)).module()


class Choosing(nn.Module):
    def forward(self, x):
        return x[x > 0].sum()


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total.add_(x.sum(0))
        return x[:, 1:].transpose(0, 1) * 2


def test_values_have_the_shapes_strides_types_and_sharing_of_a_run():
    model, x = Writing(), torch.randn(3, 4)
    graph_module = capture(model, x)
    expected = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            expected[n] = super().run_node(n)
            return expected[n]

    observed = observe(graph_module, [x])
    Recorder(capture(Writing(), x), garbage_collect_values=False).run(x)
    by_name = {node.name: value for node, value in expected.items()}
    num_compared = 0
    for node, value in observed.values.items():
        if isinstance(value, torch.Tensor):
            real = by_name[node.name]
            assert (value.shape, value.stride(), value.dtype) == (real.shape, real.stride(), real.dtype)
            num_compared += 1
    assert num_compared >= 5
    names = [node for node, value in observed.values.items() if isinstance(value, torch.Tensor) and node.op != "output"]
    for one in names:
        for two in names:
            is_shared = observed.values[one].untyped_storage()._cdata == observed.values[two].untyped_storage()._cdata
            pointers = {by_name[node.name].untyped_storage().data_ptr() for node in (one, two)}
            assert is_shared == (len(pointers) == 1), (one, two)


def test_observing_changes_neither_inputs_nor_buffers():
    model, x = Writing(), torch.randn(3, 4)
    graph_module = capture(model, x)
    before = x.clone()
    observe(graph_module, [x])
    assert torch.equal(x, before)
    assert torch.equal(dict(graph_module.named_buffers())["total"], torch.zeros(4))


def test_shapes_that_depend_on_data_are_found_by_running():
    x = torch.tensor([1.0, -1.0, 2.0])
    graph_module = capture(Choosing(), x)
    sizes = {value.shape for value in observe(graph_module, [x]).values.values() if isinstance(value, torch.Tensor)}
    assert (2,) in sizes
    assert predict_peak_bytes(graph_module, [x]) > 0
    lower_peak(graph_module, [x], is_training=False)
    assert graph_module(x) == 3


def test_what_an_operator_takes_for_itself_is_told_apart_from_its_result():
    class Normalizing(nn.Module):
        def forward(self, x):
            return torch.nn.functional.layer_norm(x, (8,)).sum()

    graph_module = capture(Normalizing(), torch.ones(16, 8))
    observed = observe(graph_module, [torch.ones(16, 8)])
    names = {node.name: size for node, size in observed.scratch_bytes.items()}
    assert all(size >= 0 for size in names.values())
    assert names["layer_norm"] > 0 and names["x"] == 0  # mean and deviation of each row are thrown away


def test_another_number_of_inputs_is_refused():
    graph_module = capture(nn.Linear(3, 3), torch.ones(1, 3))
    with pytest.raises(ConfigError, match="2 example inputs were given and the graph takes 1"):
        predict_peak_bytes(graph_module, [torch.ones(1, 3), torch.ones(1)])


def test_a_stand_in_has_the_layout_of_what_it_stands_for():
    graph_module = capture(nn.ReLU(), torch.ones(2, 3))
    (node,) = graph_module.graph.find_nodes(op="placeholder")
    value = torch.ones(4, 6, dtype=torch.float16).t()
    copy = stand_in({node: value}, node)
    assert (copy.shape, copy.stride(), copy.dtype) == (value.shape, value.stride(), value.dtype)
    assert copy is not value and stand_in({}, 3) == 3
