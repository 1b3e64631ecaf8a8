"""A budget is kept, and gradients and statistics are bit-equal."""

import copy

import pytest
import torch
from torch import nn

from deepseek.checkpoint.activation_budget import checkpoint_within_budget_, plan_checkpoints
from deepseek.checkpoint.activations import checkpoint_blocks_, find_blocks
from deepseek.compiler.passes.memory.peak_tracking import StorageTracker
from deepseek.core.errors import ConfigError
from deepseek.models.zoo import build

# torch warns about itself when inductor is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")


class Net(nn.Module):
    """Convolutions with batch statistics and dropout, in blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.3))
            for _ in range(6)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.2, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


CASES = {
    "convolutions": (Net, (4, 3, 16, 16)),
    "encoder": (encoder, (4, 12, 32)),
    "resnet18": (lambda: build("resnet18"), (2, 3, 32, 32)),
}


def step(model, x):
    torch.manual_seed(7)
    model(x).square().mean().backward()


@pytest.mark.parametrize("budget", [0.8, 0.6])
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_statistics_are_bit_equal(case, budget):
    make, shape = CASES[case]
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(shape)
    other = copy.deepcopy(model)
    plan = checkpoint_within_budget_(other, (x,), memory_budget=budget)
    assert plan.choice.recomputed
    for _ in range(2):
        step(model, x)
        step(other, x)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_what_the_plan_says(case):
    make, shape = CASES[case]
    model, x = make().train(), torch.randn(shape)
    whole = _kept(model, x)
    plan = checkpoint_within_budget_(model, (x,), memory_budget=0.6)
    assert plan.kept_before_bytes == pytest.approx(whole + x.nbytes, rel=0.03)
    released = sum(each.inside_bytes for each in plan.segments if each.name in plan.choice.recomputed)
    assert _kept(model, x) == pytest.approx(whole - released, rel=0.05)
    assert plan.choice.peak_bytes <= 0.6 * plan.kept_before_bytes
    checkpoint_blocks_(model, "none", blocks=plan.choice.recomputed)
    assert _kept(model, x) == whole


def _kept(model, x):
    """Bytes alive after a forward pass, its result included."""
    with StorageTracker() as tracker:
        output = model(x)
        alive_bytes = tracker.alive_bytes
    assert output.requires_grad
    return alive_bytes


def test_measuring_leaves_no_trace():
    model, x = Net().train(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    plan_checkpoints(model, (x,), memory_budget=0.9)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_gradients_nothing_runs_again():
    model, x = Net().train(), torch.randn(2, 3, 8, 8)
    counts = [0] * 6
    for index, block in enumerate(model.blocks):
        block[0].register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    checkpoint_within_budget_(model, (x,), memory_budget=0.5)
    counts[:] = [0] * 6
    with torch.no_grad():
        model(x)
    assert counts == [1] * 6
    model(x).sum().backward()
    assert sum(counts) > 12


def test_the_policy_none_brings_back_the_plain_model():
    model, x = Net().train(), torch.randn(2, 3, 8, 8)
    plan = checkpoint_within_budget_(model, (x,), memory_budget=0.5)
    assert {name for name in find_blocks(model) if "forward" in vars(model.get_submodule(name))} == {
        *plan.choice.recomputed
    }
    checkpoint_blocks_(model, "none")
    assert all("forward" not in vars(block) for block in model.blocks)


def test_blocks_are_found_once_and_not_inside_each_other():
    assert find_blocks(build("resnet18")) == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert find_blocks(encoder()) == [f"layers.{index}" for index in range(4)]
    with pytest.raises(ConfigError, match="has no list of repeated blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5])
def test_a_budget_that_is_no_share_is_refused(budget):
    with pytest.raises(ConfigError, match="is not a share"):
        plan_checkpoints(Net().train(), (torch.ones(1, 3, 8, 8),), memory_budget=budget)


def test_bad_blocks_are_refused():
    model, x = Net().train(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="inside block"):
        plan_checkpoints(model, (x,), memory_budget=0.5, blocks=["blocks.0", "blocks.0.0"])
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="does not run"):
        plan_checkpoints(model, (x,), memory_budget=0.5, blocks=["unused"])
    with pytest.raises(ConfigError, match=r"call model.train\(\)"):
        plan_checkpoints(model.eval(), (x,), memory_budget=0.5)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x):
            return self.block(self.block(x))

    with pytest.raises(ConfigError, match="more than once"):
        plan_checkpoints(Twice(), (torch.ones(1, 4),), memory_budget=0.5, blocks=["block"])
