import pytest
import torch
from torch import nn

from deepseek.mixed_precision import DynamicPrecision
from deepseek.mixed_precision.layer_precision import Narrowing, compute_of
from deepseek.mixed_precision.norms import run_norm


@pytest.fixture
def norm():
    torch.manual_seed(0)
    norm = nn.RMSNorm(64)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    return norm


def gradients(run, norm, x):
    x = x.clone().requires_grad_()
    y = run(x)
    torch.manual_seed(1)
    return y.detach(), *torch.autograd.grad(y, (x, norm.weight), torch.randn_like(y))


def test_it_is_torchs_norm_to_the_bit_and_its_gradients_are_no_further_from_float64(norm):
    x = torch.randn(3, 40, 64) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    ours, torchs = gradients(lambda x: run_norm(norm, x), norm, x), gradients(norm, norm, x)
    assert torch.equal(ours[0], torchs[0])
    exact_norm = nn.RMSNorm(64, eps=torch.finfo(torch.float32).eps).double()
    exact_norm.load_state_dict(norm.state_dict())
    x64 = x.double().requires_grad_()
    torch.manual_seed(1)
    exact = torch.autograd.grad(exact_norm(x64), (x64, exact_norm.weight), torch.randn_like(ours[0]).double())
    for one, other, truth in zip(ours[1:], torchs[1:], exact, strict=True):
        scale = truth.abs().max()
        assert (one - truth).abs().max() / scale < max(2 * (other - truth).abs().max() / scale, 1e-6)


def test_it_keeps_its_input_once_and_narrow(norm):
    kept = {}

    class Counting(Narrowing):
        def __init__(self, weights):
            super().__init__(weights)
            pack = self.pack_hook
            self.pack_hook = lambda value: note(pack(value))

    def note(stored):
        tensor = stored[0] if isinstance(stored, tuple) else stored.values
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return stored

    x = torch.randn(1024, 64, requires_grad=True)
    with Counting([norm.weight]):
        y = run_norm(norm, x * 1.0)
    assert sum(kept.values()) == 1024 * 64 * 2 + 1024 * 4 + 64 * 4  # the input, a scale a row, the weight
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_gradients_of_gradients_are_right(norm):
    x = torch.randn(5, 64, requires_grad=True)
    answers = []
    for run in (lambda x: run_norm(norm, x), norm):
        (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        answers.append(torch.autograd.grad(first.square().sum(), (x, norm.weight)))
    for ours, torchs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: nn.RMSNorm(64, elementwise_affine=False), lambda: nn.RMSNorm((4, 64))])
def test_unusual_norms_run_as_they_are(make):
    norm, x = make(), torch.randn(3, 4, 64, requires_grad=True)
    assert run_norm(norm, x).grad_fn.name() == norm(x).grad_fn.name()


def test_a_norm_of_ones_own_is_not_replaced():
    class Shifted(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) + 1

    norm, x = Shifted(64), torch.randn(2, 64, requires_grad=True)
    assert torch.equal(run_norm(norm, x), nn.RMSNorm.forward(norm, x) + 1)


def test_a_frozen_weight_or_input_gets_no_gradient(norm):
    norm.weight.requires_grad_(False)
    x = torch.randn(7, 64, requires_grad=True)
    run_norm(norm, x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None
    norm.weight.requires_grad_(True)
    run_norm(norm, torch.randn(7, 64)).sum().backward()
    assert norm.weight.grad is not None


def test_norms_between_low_layers_are_ours_and_come_back(norm):
    model = nn.Sequential(nn.Linear(64, 64), norm, nn.Linear(64, 64))
    dynamic = DynamicPrecision(model, low="bf16", costs="assumed")
    assert compute_of(norm) is not None
    x = torch.randn(300, 64)
    assert norm(x).grad_fn.name() == "_NormBackward"
    dynamic.remove()
    assert compute_of(norm) is None and norm(x).grad_fn.name() != "_NormBackward"
    DynamicPrecision(model, low="bf16", start="fp32", costs="assumed")
    assert compute_of(norm) is None


def test_a_gradient_of_gradients_needs_no_trainable_weight(norm):
    norm.weight.requires_grad_(False)
    x = torch.randn(5, 64, requires_grad=True)
    answers = []
    for run in (lambda x: run_norm(norm, x), norm):
        (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        answers.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
