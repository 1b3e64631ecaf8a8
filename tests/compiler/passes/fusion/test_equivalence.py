"""A rewrite stays only where its numbers are as near to float64 as its precision allows."""

import copy

import pytest
import torch
from torch import nn

from deepseek.compiler.passes.fusion.batch_norm import match_convolution_batch_norm
from deepseek.compiler.passes.fusion.graphs import ProposedRewrite
from deepseek.compiler.passes.fusion.rewrite_rules import FusionRule, fuse
from tests.compiler.passes.fusion.fused_models import IMAGES, settle
from tests.processors import needs_avx512

# torch warns about itself when it decomposes an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def wrong_fold(node, graph):
    """The right rule with a bias that is off by a thousandth of its size."""
    match = match_convolution_batch_norm(node, graph)
    if not isinstance(match, ProposedRewrite):
        return match

    def emit():
        (result,) = match.emit()
        bias = graph.constant(result.args[2])
        bias.add_(bias.abs().max() * 1e-3)
        return (result,)

    return ProposedRewrite(match.replaced, match.results, match.inputs, emit)


def test_a_wrong_rewrite_is_taken_back_and_says_so():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(IMAGES)
    fused = fuse(model, (x,), rules=(FusionRule("wrong", wrong_fold),))
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

        return ProposedRewrite((node,), (node,), (node.args[0],), emit)

    fused = fuse(
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), (torch.randn(2, 3),), rules=(FusionRule("odd", match),)
    )
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


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_avx512), torch.float16, torch.float64]
)
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
