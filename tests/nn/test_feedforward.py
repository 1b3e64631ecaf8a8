import math

import torch

from deepseek.nn.feedforward import MLP, SwiGLU


def test_swiglu_is_the_formula():
    torch.manual_seed(0)
    block, x = SwiGLU(5, 7, bias=True).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    gate, up = (x @ each.weight.T + each.bias for each in (block.gate_proj, block.up_proj))
    expected = (gate / (1 + torch.exp(-gate)) * up) @ block.down_proj.weight.T + block.down_proj.bias
    torch.testing.assert_close(block(x), expected)


def test_the_plain_block_uses_the_tanh_gelu():
    torch.manual_seed(0)
    block, x = MLP(5, 7).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    up = x @ block.up_proj.weight.T + block.up_proj.bias
    gelu = up / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    torch.testing.assert_close(block(x), gelu @ block.down_proj.weight.T + block.down_proj.bias)


def test_biases_are_where_they_were_asked_for():
    for block in (SwiGLU(4, 6, bias=False), MLP(4, 6, bias=False)):
        assert all(each.ndim == 2 for each in block.parameters())
    for block in (SwiGLU(4, 6, bias=True), MLP(4, 6)):
        assert sum(each.ndim == 1 for each in block.parameters()) == sum(each.ndim == 2 for each in block.parameters())
