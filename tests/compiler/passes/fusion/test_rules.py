"""Fused graphs compute what the model computes, with fewer operators, and nothing is fused that must not be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek.compiler.passes.fusion.batch_norm import match_convolution_batch_norm
from deepseek.compiler.passes.fusion.graphs import Candidate, Refusal
from deepseek.compiler.passes.fusion.rules import RULES, Rule, fuse, fuse_graph
from deepseek.core.errors import ConfigError

# torch warns about itself when it decomposes an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
IMAGES = (2, 3, 9, 9)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        torch.manual_seed(0)
        yield


def settle(model):
    """Statistics and scales as after training, so that folding them does something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.normal_()
            module.bias.normal_()
    return model.eval()


def check(model, inputs, *, num_operators, fired, kernels="eager", tolerance=1e-5):
    """Fuse, compare with the model in float64, and return the report."""
    model = settle(model)
    expected = copy.deepcopy(model).double()(*(each.double() for each in inputs))
    fused = fuse(model, inputs, kernels=kernels)
    answer = fused.graph_module(*inputs)
    assert float((answer - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert [each.rule for each in fused.report.fusions] == list(fired)
    assert fused.report.num_operators_after == num_operators
    return fused.report


class Residual(nn.Module):
    def __init__(self, activation, *, in_place=False):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.activation, self.in_place = activation, in_place

    def forward(self, x):
        y = self.norm(self.convolution(x))
        if self.in_place:
            y += x
            return self.activation(y)
        return self.activation(y + x)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_convolution_norm_and_activation_become_one_operator(activation):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), activation)
    fired = ["convolution + batch norm", "convolution + activation"]
    report = check(model, (torch.randn(IMAGES),), num_operators=1, fired=fired)
    assert report.num_operators_before == 3
    assert all(0 < each.max_error < 1e-5 for each in report.fusions)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2, groups=3),
        nn.Conv2d(3, 6, (1, 3), padding=(0, 1)),
        nn.ConvTranspose2d(3, 6, 3, stride=2, groups=3, output_padding=1),
    ],
    ids=["grouped", "oblong", "transposed"],
)
def test_norm_folds_into_every_kind_of_convolution(convolution):
    model = settle(nn.Sequential(convolution, nn.BatchNorm2d(6)))
    x = torch.randn(IMAGES)
    exported = torch.export.export(model, (x,)).run_decompositions().module()
    fused = fuse_graph(exported, [x], kernels="inductor")
    assert [each.rule for each in fused.report.fusions] == ["convolution + batch norm"]
    torch.testing.assert_close(fused.graph_module(x), model(x), rtol=1e-4, atol=1e-5)


def test_norm_folds_into_convolutions_of_signals_and_volumes():
    check(
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)),
        (torch.randn(2, 3, 9),),
        num_operators=1,
        fired=["convolution + batch norm"],
    )
    check(
        nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()),
        (torch.randn(2, 3, 5, 5, 5),),
        num_operators=1,
        fired=["convolution + batch norm", "convolution + activation"],
    )


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.ReLU6()], ids=["silu", "hardswish", "relu6"])
def test_activations_are_recognized_after_decomposition(activation):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation))
    x = torch.randn(IMAGES)
    fused = fuse_graph(torch.export.export(model, (x,)).run_decompositions().module(), [x])
    assert fused.report.num_operators_after == 1
    torch.testing.assert_close(fused.graph_module(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_residual_block_is_one_operator(in_place):
    fired = ["convolution + batch norm", "convolution + add + activation"]
    check(Residual(nn.ReLU(), in_place=in_place), (torch.randn(IMAGES),), num_operators=1, fired=fired)


def test_an_activation_that_the_addition_kernel_lacks_stays():
    fired = ["convolution + batch norm", "convolution + add + activation"]
    check(Residual(nn.Hardswish()), (torch.randn(IMAGES),), num_operators=2, fired=fired)


def test_both_terms_of_a_residual_may_be_convolutions():
    class Downsampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            shortcut = self.two(x)
            shortcut += self.one(x)
            return F.relu(shortcut)

    fired = ["convolution + add + activation", "convolution, weights laid out"]
    check(Downsampling(), (torch.randn(IMAGES),), num_operators=2, fired=fired)


def test_what_a_code_generator_fuses_is_left_to_it_and_said():
    fired = ["convolution + batch norm"]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    report = check(model, (torch.randn(IMAGES),), num_operators=2, fired=fired, kernels="inductor")
    (rejection,) = report.rejections
    assert rejection.rule == "convolution + activation"
    assert "code generator" in rejection.reason


def test_linear_and_norm_become_one():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    check(model, (torch.randn(4, 6),), num_operators=1, fired=["linear + batch norm"])


def test_norm_over_positions_is_not_folded_into_a_linear_layer():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(7))
    report = check(model, (torch.randn(4, 7, 6),), num_operators=2, fired=[])
    assert "not the outputs of the linear layer" in report.rejections[0].reason


def test_linear_layers_in_a_row_become_one_where_that_is_cheaper():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 32, bias=False), nn.Linear(32, 5))
    fired = ["dropout in evaluation", "linear + linear", "linear + linear"]
    check(model, (torch.randn(3, 7, 4),), num_operators=1, fired=fired)


def test_a_bottleneck_stays_two_layers():
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64))
    report = check(model, (torch.randn(3, 64),), num_operators=2, fired=[])
    assert report.rejections[0].reason == "one layer would take 4,096 products for each row instead of 512"


class Attention(nn.Module):
    def __init__(self, *, bias=(True, True, True)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=each) for each in bias)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 16)


@pytest.mark.parametrize("bias", [(True, True, True), (False, False, False), (True, False, True)])
def test_queries_keys_and_values_are_one_product(bias):
    x = torch.randn(2, 5, 16)
    report = check(Attention(bias=bias), (x,), num_operators=2, fired=["linear beside linear"])
    assert report.fusions[0].nodes == ("linear", "linear_1", "linear_2")


def test_layers_whose_results_leave_the_graph_are_not_merged():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x):
            return self.one(x), self.two(x)

    fused = fuse(Heads().eval(), (torch.randn(4, 6),))
    assert "leaves the graph" in fused.report.rejections[0].reason


def test_a_convolution_that_others_read_keeps_its_norm():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.convolution(x)
            return self.norm(y) * y

    report = check(Shared(), (torch.randn(IMAGES),), num_operators=3, fired=["convolution, weights laid out"])
    assert "read by others" in report.rejections[0].reason


def test_nothing_is_fused_across_a_write_into_the_input():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = x * 2
            y = self.convolution(x)
            x.add_(1.0)
            return self.norm(y) + x

    model = settle(Writing())
    x = torch.randn(IMAGES)
    fused = fuse(model, (x,))
    assert any("may write into what it reads" in each.reason for each in fused.report.rejections)
    torch.testing.assert_close(fused.graph_module(x), model(x), rtol=1e-5, atol=1e-5)


def test_statistics_of_the_batch_are_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(IMAGES)
    fused = fuse(model, (x,))
    assert all("batch norm" not in each.rule for each in fused.report.fusions)
    torch.testing.assert_close(fused.graph_module(x), model(x))


def test_weights_that_are_written_to_are_not_folded():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            self.norm.running_mean.add_(1.0)
            return self.norm(self.convolution(x))

    model = settle(Counting())
    x = torch.randn(IMAGES)
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    (written,) = exported.graph.find_nodes(op="call_function", target=torch.ops.aten.add_.Tensor)
    written.replace_all_uses_with(written.args[0])  # read under its own name, as other captures write it
    fused = fuse_graph(exported, [x])
    assert all("batch norm" not in each.rule for each in fused.report.fusions)
    for _ in range(3):
        torch.testing.assert_close(fused.graph_module(x), model(x), rtol=1e-4, atol=1e-5)


def wrong_fold(node, graph):
    """The right rule with a bias that is off by a thousandth of its size."""
    match = match_convolution_batch_norm(node, graph)
    if not isinstance(match, Candidate):
        return match

    def emit():
        (result,) = match.emit()
        bias = graph.constant(result.args[2])
        bias.add_(bias.abs().max() * 1e-3)
        return (result,)

    return Candidate(match.replaced, match.results, match.inputs, emit)


def test_a_wrong_rewrite_is_taken_back_and_says_so():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(IMAGES)
    fused = fuse(model, (x,), rules=(Rule("wrong", wrong_fold),))
    assert fused.report.fusions == ()
    assert fused.report.rejections[0].reason.startswith("taken back: it is off by")
    assert fused.report.num_operators_after == fused.report.num_operators_before
    assert not [name for name, _ in fused.graph_module.named_buffers() if name.startswith("fused")]
    torch.testing.assert_close(fused.graph_module(x), model(x))


def test_a_kernel_that_does_not_run_here_is_taken_back():
    def match(node, graph):
        if node.target is not torch.ops.aten.relu.default:
            return None
        call = torch.ops.aten.narrow.default

        def emit():
            return (graph.add_call(call, node.args[0], 9, 0, 1, like=graph.values[node]),)

        return Candidate((node,), (node,), (node.args[0],), emit)

    fused = fuse(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), (torch.randn(2, 3),), rules=(Rule("odd", match),))
    assert "does not run here" in fused.report.rejections[0].reason
    assert fused.report.num_operators_after == 2


def test_weights_that_overflow_when_folded_are_kept_apart():
    model = settle(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).half()
    model[0].weight.fill_(0.01)
    model[0].bias.zero_()
    model[1].running_var.fill_(0.0)
    model[1].eps = 1e-10
    model[1].weight.fill_(100.0)
    x = torch.full((1, 3, 4, 4), 1e-3, dtype=torch.float16)
    fused = fuse(model, (x,))
    assert all("batch norm" not in each.rule for each in fused.report.fusions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_is_fused_within_its_own_rounding(dtype):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).to(dtype)
    x = torch.randn(IMAGES).to(dtype)
    fused = fuse(model, (x,))
    expected = copy.deepcopy(model).double()(x.double())
    answer = fused.graph_module(x)
    assert answer.dtype == dtype
    error = (answer.double() - expected).abs().max() / expected.abs().max()
    assert fused.report.num_operators_after <= 2
    assert float(error) <= 16 * torch.finfo(dtype).eps


def test_the_model_itself_is_left_as_it_was():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    before = copy.deepcopy(model.state_dict())
    fuse(model, (torch.randn(IMAGES),))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_folded_weights_replace_the_old_ones_in_memory():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    fused = fuse(model, (torch.randn(IMAGES),), kernels="inductor").graph_module
    assert sorted(value.shape for value in fused.buffers()) == [torch.Size([8]), torch.Size([8, 3, 3, 3])]
    assert list(fused.parameters()) == []


def test_a_model_in_training_is_refused():
    with pytest.raises(ConfigError, match=r"training mode .* model.eval\(\)"):
        fuse(nn.Linear(2, 2), (torch.ones(1, 2),))


def test_in_training_every_rule_says_why_it_did_not_fire():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    x = torch.randn(IMAGES)
    fused = fuse_graph(torch.export.export(model, (x,)).module(), [x], is_training=True)
    assert fused.report.fusions == ()
    assert [each.rule for each in fused.report.rejections] == [rule.name for rule in RULES]


def test_a_fusion_names_the_line_that_was_fused():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.relu(self.convolution(x))

    report = fuse(Written().eval(), (torch.randn(IMAGES),)).report
    line = Written.forward.__code__.co_firstlineno + 1
    assert report.fusions[0].where == f"{__file__}:{line}"
    assert f"convolution + activation at {__file__}:{line}" in str(report)


def test_a_refusal_is_not_a_candidate():
    assert Refusal((), "no").reason == "no"


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_models_of_the_zoo_stay_within_rounding(name):
    zoo = pytest.importorskip("deepseek.models.zoo")
    model = settle(zoo.build(name))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.fill_(0.5)
    x = torch.randn(1, 3, 64, 64)
    expected = copy.deepcopy(model).double()(x.double())
    fused = fuse(model, (x,))
    error = (fused.graph_module(x) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-4
    assert fused.report.num_operators_after < 0.6 * fused.report.num_operators_before
