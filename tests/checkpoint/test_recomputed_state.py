"""What a checkpointed function changes besides its result changes once per step, as without the checkpoint."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepseek as ds
from deepseek.core.errors import ConfigError

POLICIES = ("selective", "block")


class Codebook(nn.Module):
    """A buffer that moves with the inputs and decides the result, as in vector quantization."""

    def __init__(self, num_rows=4):
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, num_rows * 8).reshape(num_rows, 8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        index = torch.cdist(x.detach(), self.codes[:4]).argmin(dim=-1)
        out = (x * self.codes[index]).tanh() * self.scale
        self.codes.mul_(0.5).add_(0.5 * x.detach().mean(dim=0))
        return out


class Replaced(nn.Module):
    """State that is replaced and not written to: a buffer, a tensor attribute, a number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.largest = torch.zeros(())
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        out = (x * (1 + self.calls) + self.average + self.largest).sin() * self.weight
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(dim=0)
        self.largest = torch.maximum(self.largest, x.detach().amax())
        self.calls += 1
        return out


class Noted(nn.Module):
    """Something that the loss reads after the forward pass, as routers of experts keep it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        self.penalty = y.square().mean()
        return y.tanh()


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 8))


CASES = {
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
    "cumulative batch norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU()),
    "instance norm": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True)),
    "spectral norm": spectral,
    "codebook": Codebook,
    "large codebook": lambda: Codebook(num_rows=50_000),
    "replaced": Replaced,
}


def state_of(module):
    plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | torch.Tensor)}
    return {**dict(module.state_dict()), **plain}


def assert_alike(one, other):
    for (name, mine), theirs in zip(state_of(one).items(), state_of(other).values(), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs)), name
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_state_and_gradients_are_those_of_the_plain_module_for_several_steps(case, policy):
    torch.manual_seed(0)
    plain = CASES[case]()
    if isinstance(plain[0] if isinstance(plain, nn.Sequential) else None, nn.Unflatten):
        plain.append(nn.Flatten())
    checkpointed = ds.checkpoint(policy=policy)(copy.deepcopy(plain))
    for step in range(3):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)) + 3
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        for module, given in zip((plain, checkpointed), inputs, strict=True):
            module(given).square().mean().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert_alike(checkpointed, plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_two_forward_passes_before_one_backward_pass(policy):
    torch.manual_seed(0)
    plain = CASES["batch norm"]()
    checkpointed = ds.checkpoint(policy=policy)(copy.deepcopy(plain))
    x = torch.randn(16, 8)
    for module in (plain, checkpointed):
        (module(x).sum() + module(x + 1).square().sum()).backward()
    assert_alike(checkpointed, plain)


def test_checkpoints_inside_checkpoints_move_statistics_once():
    torch.manual_seed(0)
    plain = nn.Sequential(*(CASES["batch norm"]() for _ in range(2)))
    checkpointed = copy.deepcopy(plain)
    for block in checkpointed:
        ds.checkpoint(block[1])
        ds.checkpoint(policy="selective")(block)
    ds.checkpoint(checkpointed)
    for module in (plain, checkpointed):
        torch.manual_seed(1)
        module(torch.randn(16, 8)).square().mean().backward()
    assert_alike(checkpointed, plain)


def test_a_backward_pass_that_is_repeated_changes_nothing_more():
    torch.manual_seed(0)
    plain = CASES["batch norm"]()
    checkpointed = ds.checkpoint(copy.deepcopy(plain))
    x = torch.randn(16, 8)
    for module in (plain, checkpointed):
        loss = module(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_alike(checkpointed, plain)


def test_without_a_backward_pass_state_is_that_of_one_pass():
    torch.manual_seed(0)
    plain = CASES["batch norm"]()
    checkpointed = ds.checkpoint(copy.deepcopy(plain))
    x = torch.randn(16, 8)
    plain(x), checkpointed(x)
    assert_alike(checkpointed, plain)


def close_over(norm, linear):
    return lambda x: norm(linear(x)).relu()


def take_as_argument(norm, linear):
    return functools.partial(lambda modules, x: modules["norm"](linear(x)).relu(), {"norm": norm})


def bind(norm, linear):
    class Holder:
        layers = nn.ModuleList([linear, norm])

        def run(self, x):
            return self.layers[1](self.layers[0](x)).relu()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = norm, linear

        def run(self, x):
            return self.norm(self.linear(x)).relu()

    return Block().run


NORM = nn.BatchNorm1d(8)


def run_global(linear, x):
    return NORM(linear(x)).relu()


def name_globally(norm, linear):
    NORM.load_state_dict(norm.state_dict())
    return functools.partial(run_global, linear)


@pytest.mark.parametrize("reach", [close_over, take_as_argument, bind, name_globally])
def test_modules_are_found_wherever_a_function_reaches_them(reach):
    torch.manual_seed(0)
    norm, linear, x = nn.BatchNorm1d(8), nn.Linear(8, 8), torch.randn(16, 8)
    other_norm, other_linear = copy.deepcopy(norm), copy.deepcopy(linear)
    close_over(norm, linear)(x).sum().backward()
    function = reach(other_norm, other_linear)
    reached = NORM if reach is name_globally else other_norm
    ds.checkpoint(function)(x).sum().backward()
    assert torch.equal(norm.running_mean, reached.running_mean)
    assert int(reached.num_batches_tracked) == 1
    assert torch.equal(linear.weight.grad, other_linear.weight.grad)


def test_statistics_that_are_given_or_closed_over_move_once():
    kept = {}
    for is_checkpointed in (False, True):
        given, mean, variance, calls = torch.ones(8), torch.zeros(8), torch.ones(8), 0

        def normalize(x, given):
            nonlocal calls, mean
            calls += 1
            mean = 0.9 * mean + 0.1 * x.detach().mean(dim=0)
            given.mul_(0.9)
            y = F.batch_norm(x * given, given, variance, training=True)  # noqa: B023
            return (y * calls).sin()

        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (ds.checkpoint(normalize) if is_checkpointed else normalize)(x, given).sum().backward()
        kept[is_checkpointed] = [given, mean, variance, torch.tensor(calls), x.grad]
    for mine, theirs in zip(kept[True], kept[False], strict=True):
        assert torch.equal(mine, theirs)


def test_what_the_loss_reads_after_the_forward_pass_is_not_replaced_by_the_second_run():
    torch.manual_seed(0)
    plain = Noted()
    checkpointed = ds.checkpoint(copy.deepcopy(plain))
    x = torch.randn(4, 8)
    for module in (plain, checkpointed):
        loss = module(x).sum() + module.penalty
        noted = module.penalty
        loss.backward()
        assert module.penalty is noted
    assert_alike(checkpointed, plain)


def test_evaluation_mode_between_the_passes_leaves_dropout_in_the_second_run():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
    checkpointed = ds.checkpoint(copy.deepcopy(plain))
    for module in (plain, checkpointed):
        torch.manual_seed(1)
        y = module(torch.ones(16, 8))
        module.eval()
        y.square().sum().backward()
        assert not module[1].training
    assert_alike(checkpointed, plain)


def test_writing_into_an_input_is_refused():
    @ds.checkpoint
    def shift(x):
        return x.add_(1).square()

    x = torch.ones(4, requires_grad=True)
    with pytest.raises(ConfigError, match=r"shift writes into a tensor of shape \(4,\) that it was given.*x\.clone"):
        shift(x * 1)


def test_an_input_that_is_written_to_before_the_backward_pass_is_refused():
    module = ds.checkpoint(nn.Linear(512, 8))
    x = torch.ones(1024, 512)
    loss = module(x).sum()
    x.zero_()
    with pytest.raises(ConfigError, match="was written to before the backward pass"):
        loss.backward()


def test_copies_of_large_tensors_that_stay_as_they_are_are_dropped():
    from deepseek.compiler.passes.memory.peak_tracking import StorageTracker

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(1024, 1024))
            self.weight = nn.Parameter(torch.ones(8, 1024))

        def forward(self, x):
            return x * (self.weight @ self.mask)

    module = ds.checkpoint(Masked())
    with StorageTracker() as tracker:
        y = module(torch.ones(8, 1024, requires_grad=True))
        alive_bytes = tracker.alive_bytes
    assert y.requires_grad and alive_bytes < module.mask.nbytes / 4
