"""Batch normalization disappears into the layer before it, and stays where it must."""

import pytest
import torch
from torch import nn

from deepseek.compiler.passes.fusion.rewrite_rules import fuse, fuse_graph
from tests.compiler.passes.fusion.fused_models import IMAGES, check, settle

# torch warns about itself when it decomposes an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


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


def test_linear_and_norm_become_one():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    check(model, (torch.randn(4, 6),), num_operators=1, fired=["linear + batch norm"])


def test_norm_over_positions_is_not_folded_into_a_linear_layer():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(7))
    report = check(model, (torch.randn(4, 7, 6),), num_operators=2, fired=[])
    assert "not the outputs of the linear layer" in report.rejections[0].reason


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


def test_statistics_of_the_batch_are_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(IMAGES)
    fused = fuse(model, (x,))
    assert all("batch norm" not in each.rule for each in fused.report.fusions)
    torch.testing.assert_close(fused.graph_module(x), model(x))
