import pytest
import torch
from torch import nn

from deepseek.optim.muon import Muon, orthogonalize

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def fill_gradients(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_singular_values_go_through_the_polynomial_and_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    values = singular / matrix.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    expected = left @ torch.diag(values) @ right
    torch.testing.assert_close(orthogonalize(matrix, COEFFICIENTS, 5, 1e-7), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        orthogonalize(matrix.float(), COEFFICIENTS, 5, 1e-7).double(), expected, rtol=1e-3, atol=1e-4
    )


def test_steps_are_those_of_torch_but_for_the_rounding_of_bf16():
    ours = [nn.Parameter(torch.full(shape, 0.5)) for shape in ((32, 64), (64, 32))]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    one = Muon(ours, lr=0.01, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        fill_gradients(ours, seed)
        fill_gradients(theirs, seed)
        one.step()
        other.step()
    for mine, reference in zip(ours, theirs, strict=True):
        change, expected = mine.detach() - 0.5, reference.detach() - 0.5
        assert (change - expected).norm() < 0.02 * expected.norm()  # bf16 has 8 bits
        torch.testing.assert_close(one.state[mine], other.state[reference], rtol=0, atol=0)


def test_a_state_of_torch_is_taken_up():
    weight, twin = (nn.Parameter(torch.eye(16)) for _ in range(2))
    theirs = torch.optim.Muon([weight], lr=0.01, adjust_lr_fn="match_rms_adamw")
    fill_gradients([weight], 0)
    theirs.step()
    ours = Muon([twin], lr=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[twin]["momentum_buffer"], theirs.state[weight]["momentum_buffer"])
    assert ours.param_groups[0]["lr"] == 0.01


def test_a_closure_computes_the_gradients():
    weight = nn.Parameter(torch.eye(16))
    optimizer = Muon([weight], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 16
    assert weight[0, 0] < 1
