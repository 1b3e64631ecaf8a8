"""Nothing moves across a write, and what is written to is no constant."""

import copy

import pytest
import torch
from torch import nn

from deepseek.compiler.passes.fusion.graphs import Refusal
from deepseek.compiler.passes.fusion.rewrite_rules import fuse, fuse_graph
from tests.compiler.passes.fusion.fused_models import IMAGES, settle

# torch warns about itself when it decomposes an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Writing(nn.Module):
    """Writes into what its convolution read, through an alias, before the norm that would be folded into it."""

    def __init__(self, alias):
        super().__init__()
        self.convolution, self.norm, self.alias = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), alias

    def forward(self, x):
        x = x * 2
        y = self.convolution(x)
        self.alias(x).add_(1.0)
        return self.norm(y) + x


ALIASES = {
    "itself": lambda x: x,
    "view": lambda x: x.view(-1),
    "slice": lambda x: x[:, 1:],
    "transpose": lambda x: x.transpose(0, 1),
    "split": lambda x: x.split(1, dim=1)[1],
    "chunk": lambda x: x.chunk(3, dim=1)[2],
    "unbind": lambda x: x.unbind(0)[1],
    "dropout in evaluation": lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
    "contiguous": lambda x: x.contiguous(),
    "reshape": lambda x: x.reshape(2, -1),
    "expand of a part": lambda x: x[:1].expand(1, -1, -1, -1).squeeze(0),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_nothing_is_fused_across_a_write_into_the_input(alias):
    model = settle(Writing(ALIASES[alias]))
    x = torch.randn(IMAGES)
    fused = fuse(model, (x,))
    assert any("may write into what it reads" in rejection.reason for rejection in fused.report.rejections)
    torch.testing.assert_close(fused.graph_module(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_write_into_something_else_is_no_obstacle():
    model = settle(Writing(lambda x: x.clone()))
    x = torch.randn(IMAGES)
    fused = fuse(model, (x,))
    assert any("batch norm" in fusion.rule for fusion in fused.report.fusions)
    torch.testing.assert_close(fused.graph_module(x), model(x), rtol=1e-5, atol=1e-5)


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


def test_a_refusal_is_not_a_candidate():
    assert Refusal((), "no").reason == "no"
