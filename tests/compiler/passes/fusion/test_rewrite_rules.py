"""Fused graphs compute what the model computes, with fewer operators, and nothing is fused that must not be."""

import copy

import pytest
import torch
from torch import nn

from deepseek.compiler.passes.fusion.rewrite_rules import RULES, fuse, fuse_graph
from deepseek.core.errors import ConfigError
from tests.compiler.passes.fusion.fused_models import IMAGES, settle

# torch warns about itself when it decomposes an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


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
