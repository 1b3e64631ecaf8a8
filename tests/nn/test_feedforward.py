import math

import torch

from deepseek.nn.feedforward import MLP, GeGLU, SwiGLU


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


def test_the_gelu_gated_block_is_the_formula_with_the_tanh_approximation():
    block = GeGLU(8, 12).double()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = block.gate_proj(x), block.up_proj(x)
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(block(x), block.down_proj(gelu * up), rtol=1e-6, atol=1e-7)
