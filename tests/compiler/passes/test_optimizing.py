"""All passes together: graphs with and without control flow compute the same, and the report says what happened."""

import copy

import pytest
import torch
from torch import nn

from deepseek.compiler.passes.optimizing import optimize
from deepseek.compiler.passes.placement import devices
from deepseek.compiler.passes.placement.assignment import Link
from deepseek.core.errors import ConfigError
from deepseek.models.zoo import build

# torch warns about itself when it decomposes a graph and when inductor is loaded.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
]


def capture(model, *inputs, **options):
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, **options).module()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.convolution, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm2(self.convolution(x)) + x)
        return self.head(x.mean((2, 3)))


class Branching(nn.Module):
    """A layer in each branch, as `@ds.jit` leaves an `if`."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU())

    def forward(self, x):
        y = torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.two(x), (x,))
        return y + 1


@pytest.mark.parametrize("kernels", ["eager", "inductor"])
def test_a_graph_computes_the_same_with_fewer_operators_and_less_memory(kernels):
    model, x = Net(), torch.randn(2, 3, 16, 16)
    graph_module = capture(model, x)
    optimized = optimize(graph_module, (x,), is_training=False, kernels=kernels)
    with torch.no_grad():
        torch.testing.assert_close(optimized.graph_module(x), model(x), rtol=1e-4, atol=1e-5)
    fusion, memory = optimized.report.fusion, optimized.report.memory
    assert fusion.num_operators_before == 9
    assert fusion.num_operators_after == (4 if kernels == "eager" else 7)
    assert memory.peak_in_place_bytes <= memory.peak_reordered_bytes <= memory.peak_before_bytes
    assert "operators became" in str(optimized.report)
    assert "in place" in str(optimized.report)


def test_the_graph_that_was_given_is_left_as_it_was():
    model, x = Branching(), torch.randn(2, 3, 8, 8)
    graph_module = capture(model, x)
    code = graph_module.code
    inside = [getattr(graph_module, name).code for name in ("true_graph_0", "false_graph_0")]
    state = copy.deepcopy(graph_module.state_dict())
    optimize(graph_module, (x,), is_training=False)
    assert graph_module.code == code
    assert [getattr(graph_module, name).code for name in ("true_graph_0", "false_graph_0")] == inside
    assert all(torch.equal(state[name], value) for name, value in graph_module.state_dict().items())


@pytest.mark.parametrize("sign", [1, -1])
def test_branches_are_fused_and_both_are_right(sign):
    torch.manual_seed(0)
    model, x = Branching(), torch.rand(2, 3, 8, 8) * sign
    model.one[1].running_mean.fill_(0.3)
    model.two[1].running_var.fill_(4.0)
    optimized = optimize(capture(model, x), (x,), is_training=False, kernels="eager")
    assert [each.rule for each in optimized.report.fusion.fusions] == [
        *("convolution + batch norm", "convolution + activation"),
        *("convolution + batch norm", "convolution + activation"),
    ]
    for each in (x, -x):
        with torch.no_grad():
            torch.testing.assert_close(optimized.graph_module(each), model(each), rtol=1e-4, atol=1e-5)


def test_a_fused_branch_compiles():
    model, x = Branching(), torch.rand(2, 3, 8, 8)
    optimized = optimize(capture(model, x), (x,), is_training=False, kernels="inductor")
    compiled = torch.compile(optimized.graph_module, backend="aot_eager", fullgraph=True)
    for each in (x, -x):
        with torch.no_grad():
            torch.testing.assert_close(compiled(each), model(each), rtol=1e-4, atol=1e-5)


def test_other_batch_sizes_run_where_the_graph_allows_them():
    model, x = Net(), torch.randn(4, 3, 16, 16)
    batch = torch.export.Dim("batch", min=2, max=64)
    graph_module = capture(model, x, dynamic_shapes={"x": {0: batch}})
    optimized = optimize(graph_module, (x,), is_training=False)
    for size in (2, 7, 64):
        other = torch.randn(size, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(optimized.graph_module(other), model(other), rtol=1e-4, atol=1e-5)


def test_decomposed_graphs_are_taken_as_well():
    model, x = Net(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        graph_module = torch.export.export(model.eval(), (x,)).run_decompositions().module()
        optimized = optimize(graph_module, (x,), is_training=False, kernels="eager")
        torch.testing.assert_close(optimized.graph_module(x), model(x), rtol=1e-4, atol=1e-5)
    assert optimized.report.fusion.num_operators_after == 4


def test_in_training_gradients_are_those_of_the_model():
    torch.manual_seed(0)
    model, x = Net().train(), torch.randn(2, 3, 16, 16)
    other = copy.deepcopy(model)
    optimized = optimize(torch.export.export(other, (x,)).module(), (x,), is_training=True)
    for _ in range(2):
        model(x).square().sum().backward()
        optimized.graph_module(x).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)
    assert optimized.report.fusion.fusions == ()


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_under_a_budget_less_is_kept_and_gradients_are_the_same(budget):
    torch.manual_seed(0)
    layers = [each for _ in range(4) for each in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU())]
    model, x = nn.Sequential(*layers).double().train(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    other = copy.deepcopy(model)
    graph_module = torch.export.export(other, (x,)).module()
    optimized = optimize(graph_module, (x,), is_training=True, memory_budget=budget)
    kept, answer = measure_kept(lambda: optimized.run(x))
    plain_kept, expected = measure_kept(lambda: model(x))
    assert kept <= plain_kept * (1.0 if budget == 1.0 else 0.4)
    answer.square().sum().backward()
    expected.square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-9)
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def measure_kept(run):
    """Bytes that autograd saves in a forward pass, and its result."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(saved.values()), result


def test_a_budget_without_a_backward_pass_is_refused():
    graph_module = capture(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ConfigError, match=r"memory_budget=0.5 is for training"):
        optimize(graph_module, (torch.ones(1, 2),), is_training=False, memory_budget=0.5)


def test_tied_weights_stay_right():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.relu(self.one(x))) + self.one(x)

    model, x = Tied(), torch.randn(3, 8)
    optimized = optimize(capture(model, x), (x,), is_training=False)
    with torch.no_grad():
        torch.testing.assert_close(optimized.graph_module(x), model(x))


def test_a_graph_of_python_functions_is_refused():
    graph_module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    traced = torch.fx.symbolic_trace(lambda x: torch.nn.functional.relu(x))
    for each in (traced, torch.fx.symbolic_trace(lambda x: x.relu()), graph_module):
        with pytest.raises(ConfigError, match=r"capture it with torch.export"):
            optimize(each, (torch.ones(1, 2),), is_training=False)


def test_another_number_of_inputs_is_refused():
    graph_module = capture(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises((ConfigError, ValueError, AssertionError, RuntimeError)):
        optimize(graph_module, (torch.ones(1, 2), torch.ones(1, 2)), is_training=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_large", "vit_b_16"])
def test_models_of_the_zoo_are_optimized_within_rounding(name):
    model, x = build(name), torch.randn(1, 3, 224, 224)
    graph_module = capture(model, x)
    optimized = optimize(graph_module, (x,), is_training=False, kernels="eager")
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        error = (optimized.graph_module(x) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-4
    assert optimized.report.fusion.num_operators_after < optimized.report.fusion.num_operators_before


def test_several_devices_are_measured_and_the_report_says_what_was_chosen(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval(), torch.randn(3, 8)
    with torch.no_grad():
        graph = torch.export.export(model, (x,)).run_decompositions().module()
        monkeypatch.setattr(devices, "measure_link", lambda *_: Link(1e3, 1.0))  # nothing comes back from meta in time
        optimized = optimize(graph, (x,), is_training=False, kernels="eager", devices=("cpu", "meta"))
        torch.testing.assert_close(optimized.run(x), model(x))
    placement = optimized.report.placement
    assert set(placement.devices.values()) == {"cpu"}
    assert placement.time_s <= min(placement.single_device_time_s.values())
    assert "devices: " in str(optimized.report) and "cpu alone" in str(optimized.report)
    assert "devices: " not in str(optimize(graph, (x,), is_training=False, kernels="eager").report)


def test_several_devices_are_refused_in_training():
    x = torch.randn(3, 8)
    graph = torch.export.export(nn.Linear(8, 4), (x,)).module()
    with pytest.raises(ConfigError, match=r"devices=\('cpu', 'meta'\) is for inference"):
        optimize(graph, (x,), is_training=True, devices=("cpu", "meta"))
