"""Activations are recognized however they are written."""

import pytest
import torch
from torch import nn

from deepseek.compiler.passes.fusion.rewrite_rules import fuse_graph
from tests.compiler.passes.fusion.fused_models import IMAGES, settle

# torch warns about itself when it decomposes an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.ReLU6()], ids=["silu", "hardswish", "relu6"])
def test_activations_are_recognized_after_decomposition(activation):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation))
    x = torch.randn(IMAGES)
    fused = fuse_graph(torch.export.export(model, (x,)).run_decompositions().module(), [x])
    assert fused.report.num_operators_after == 1
    torch.testing.assert_close(fused.graph_module(x), model(x), rtol=1e-4, atol=1e-5)
