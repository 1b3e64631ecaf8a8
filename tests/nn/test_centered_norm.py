import pytest
import torch

from deepseek.nn.centered_norm import CenteredRMSNorm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_it_is_the_formula_in_the_dtype_of_its_input(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 16, generator=generator, dtype=torch.float64)
    norm = CenteredRMSNorm(16, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
    weight = norm.weight.double()
    norm, x = norm.to(dtype if dtype != torch.bfloat16 else torch.float32), x.to(dtype)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)
    y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_new_one_only_norms():
    x = torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(CenteredRMSNorm(2, eps=0.0)(x), x / 12.5**0.5)


def test_its_gradient_is_that_of_the_formula():
    norm = CenteredRMSNorm(6, eps=1e-6).double()
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))
