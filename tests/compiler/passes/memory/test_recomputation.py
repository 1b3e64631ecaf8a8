"""Compiled training keeps what its budget allows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek.compiler.passes.memory.recomputation import eager_with_budget, inductor_with_budget
from deepseek.core.errors import ConfigError

# torch warns about itself when inductor is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")


def build_layers():
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU())))


def count_kept_bytes(model, x):
    """Bytes that autograd keeps for a step, whose gradients are computed as well."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.mse_loss(model(x), torch.zeros_like(x))
    loss.backward()
    return sum(saved.values())


def test_without_generated_code_a_budget_keeps_less_and_gradients_stay():
    x, plain = torch.randn(512, 64), build_layers()
    count_kept_bytes(plain, x)
    kept = {}
    for budget in (1.0, 0.3):
        torch._dynamo.reset()
        model = build_layers()
        kept[budget] = count_kept_bytes(torch.compile(model, backend=eager_with_budget(budget)), x)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert kept[0.3] < 0.6 * kept[1.0]


@pytest.mark.slow
def test_compiled_code_keeps_less_under_a_budget():
    x, kept = torch.randn(512, 64), {}
    for budget in (1.0, 0.3):
        torch._dynamo.reset()
        kept[budget] = count_kept_bytes(torch.compile(build_layers(), backend=inductor_with_budget(budget)), x)
    assert kept[0.3] < 0.6 * kept[1.0]


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5])
@pytest.mark.parametrize("build_backend", [inductor_with_budget, eager_with_budget])
def test_a_budget_that_is_no_share_is_refused(build_backend, budget):
    with pytest.raises(ConfigError, match="is not a share"):
        build_backend(budget)
