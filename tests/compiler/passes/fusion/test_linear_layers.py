"""Linear layers in a row or side by side become one where that is cheaper."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek.compiler.passes.fusion.rewrite_rules import fuse
from tests.compiler.passes.fusion.fused_models import check

# torch warns about itself when it decomposes an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


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
