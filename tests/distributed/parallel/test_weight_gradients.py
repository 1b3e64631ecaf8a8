"""The two halves of a backward pass against a whole one. Plans with them are in test_parity.py."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek.distributed.parallel.weight_gradients import accumulate_, split_backward_


class Net(nn.Module):
    """Linear layers with and without biases, one of them used twice, between other parameters."""

    def __init__(self, is_checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6, bias=False)
        self.frozen, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.is_checkpointed = is_checkpointed
        self.num_blocks_run = 0

    def block(self, x):
        self.num_blocks_run += 1
        return self.norm(x + self.down(self.up(x).tanh()))

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False) if self.is_checkpointed else self.block(x)
        return self.head(self.frozen(x))


TOKENS = torch.arange(6).view(2, 3)


def train_whole(net, num_batches=2):
    for index in range(num_batches):
        net((TOKENS + index) % 7).square().sum().backward()


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_both_halves_are_the_whole(is_checkpointed):
    whole, split = Net().double(), Net(is_checkpointed).double()
    train_whole(whole)
    gradients, waiting = split_backward_(split), []
    with gradients.deferring():
        losses = [split((TOKENS + index) % 7).square().sum() for index in range(2)]
        for loss in losses:
            loss.backward()
            waiting.append(gradients.take())
        assert split.up.weight.grad is None and split.up.bias.grad is None and split.norm.weight.grad is not None
        for deferred in reversed(waiting):
            accumulate_(deferred)
    assert split.num_blocks_run == (8 if is_checkpointed else 4)
    for (name, expected), found in zip(whole.named_parameters(), split.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert split.frozen.weight.grad is None


def test_outside_of_a_pipeline_nothing_is_deferred():
    whole, split = Net(), Net()
    gradients = split_backward_(split)
    train_whole(whole, 1)
    train_whole(split, 1)
    assert gradients.take() == {} and torch.equal(split.up.weight.grad, whole.up.weight.grad)


def test_what_a_failed_step_noted_is_forgotten():
    net = Net()
    gradients = split_backward_(net)
    with gradients.deferring():
        net(TOKENS).sum().backward()
    with gradients.deferring():
        assert gradients.take() == {}


def test_hooks_on_a_parameter_run_once_with_all_of_its_gradient():
    net, seen = Net(), []
    gradients = split_backward_(net)
    net.up.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    with gradients.deferring():
        net(TOKENS).square().sum().backward()
        assert seen == []
        accumulate_(gradients.take())
    assert len(seen) == 1 and torch.equal(seen[0], net.up.weight.grad)


def test_autocast_computes_the_same_narrow_products():
    whole, split = Net(), Net()
    gradients = split_backward_(split)
    for net in (whole, split):
        with gradients.deferring():
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(TOKENS).float().square().sum()
            loss.backward()
            accumulate_(gradients.take())
    assert split.up.weight.grad.dtype == torch.float32
    for expected, found in zip(whole.parameters(), split.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, rtol=2e-2, atol=2e-2)


def test_a_second_derivative_is_refused_and_not_wrong():
    layer = copy.deepcopy(Net().up)
    gradients = split_backward_(layer)
    x = torch.ones(2, 6, requires_grad=True)
    with gradients.deferring():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_layers_that_compute_something_else_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Scaled(3, 3), nn.Linear(3, 3))
    gradients = split_backward_(net)
    with gradients.deferring():
        net(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert set(gradients.take()) == {net[1].weight, net[1].bias}
    assert net[0].weight.grad is not None
