"""A budget is kept, gradients are bit-equal, and the choice of blocks is the best there is."""

import copy
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek.compiler.passes.memory.peak_tracking import StorageTracker
from deepseek.compiler.passes.memory.recomputation import (
    find_segments,
    inductor_with_budget,
    plan_recomputation,
    recompute_,
)
from deepseek.compiler.passes.memory.segments import Choice, Segment, choose, find_peak, smallest_peak
from deepseek.core.errors import ConfigError
from deepseek.models.zoo import build

# torch warns about itself when inductor is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")

# The policy

SEGMENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=7).map(
    lambda rows: [Segment(f"s{index}", float(time), *sizes) for index, (time, *sizes) in enumerate(rows)]
)


def play(segments, recomputed, outside):
    """The most that is there at once: forwards, then backwards, segment by segment."""
    there, peak = {"outside": outside}, outside
    for segment in segments:
        there[segment.name, "input"] = segment.input_bytes
        there[segment.name, "inside"] = segment.inside_bytes
        peak = max(peak, sum(there.values()))
        if segment.name in recomputed:
            del there[segment.name, "inside"]
    for segment in reversed(segments):
        there[segment.name, "inside"] = segment.inside_bytes
        peak = max(peak, sum(there.values()))
        del there[segment.name, "inside"], there[segment.name, "input"]
    return peak


@given(SEGMENTS, st.integers(0, 30), st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_the_choice_is_the_fastest_within_the_budget(segments, outside, share):
    names = [segment.name for segment in segments]
    low, high = smallest_peak(segments, outside_bytes=outside), find_peak(segments, [], outside_bytes=outside)
    budget = round(low + share * (high - low))
    choice = choose(segments, budget, outside_bytes=outside)
    assert play(segments, choice.recomputed, outside) == choice.peak_bytes <= budget
    subsets = [subset for size in range(len(names) + 1) for subset in combinations(names, size)]
    times = {each.name: each.time_s for each in segments}
    fitting = [subset for subset in subsets if play(segments, subset, outside) <= budget]
    assert choice.is_exact
    assert choice.extra_time_s == min(sum(times[name] for name in subset) for subset in fitting)


def test_many_different_segments_are_chosen_from_within_the_budget(monkeypatch):
    monkeypatch.setattr("deepseek.compiler.passes.memory.segments.MAX_CHOICES", 16)
    segments = [Segment(f"s{each}", 1.0 + each % 7, 10, 100 + each * 13 % 31) for each in range(60)]
    budget = find_peak(segments, []) // 2
    choice = choose(segments, budget)
    assert not choice.is_exact
    assert play(segments, choice.recomputed, 0) <= budget


def test_equal_segments_under_the_tightest_budget_all_run_again():
    segments = [Segment(f"s{each}", 1.0, 1, 10) for each in range(5)]
    assert choose(segments, smallest_peak(segments)).recomputed == ("s0", "s1", "s2", "s3")
    assert choose(segments, 10**6) == Choice((), 0.0, 55)


def test_a_budget_that_cannot_be_met_names_the_least():
    segments = [Segment("a", 1.0, 10, 100), Segment("b", 1.0, 10, 100)]
    with pytest.raises(ConfigError, match="120 are needed even if every segment is run again"):
        choose(segments, 119)


# Models


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
    plan = plan_recomputation(other, (x,), memory_budget=budget)
    assert plan.choice.recomputed
    recompute_(other, plan)
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
    plan = plan_recomputation(model, (x,), memory_budget=0.6)
    assert plan.kept_before_bytes == pytest.approx(whole + x.nbytes, rel=0.03)
    recomputation = recompute_(model, plan)
    released = sum(each.inside_bytes for each in plan.segments if each.name in plan.choice.recomputed)
    assert _kept(model, x) == pytest.approx(whole - released, rel=0.05)
    assert plan.choice.peak_bytes <= 0.6 * plan.kept_before_bytes
    recomputation.remove()
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
    plan_recomputation(model, (x,), memory_budget=0.9)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_gradients_nothing_runs_again():
    model, x = Net().train(), torch.randn(2, 3, 8, 8)
    counts = [0] * 6
    for index, block in enumerate(model.blocks):
        block[0].register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    recompute_(model, plan_recomputation(model, (x,), memory_budget=0.5))
    counts[:] = [0] * 6
    with torch.no_grad():
        model(x)
    model.eval()(x).sum().backward()
    assert counts == [2] * 6


def test_removing_the_plan_brings_back_the_plain_model():
    model, x = Net().train(), torch.randn(2, 3, 8, 8)
    plan = plan_recomputation(model, (x,), memory_budget=0.5)
    recomputation = recompute_(model, plan)
    with pytest.raises(ConfigError, match="runs again already"):
        recompute_(model, plan)
    recomputation.remove()
    assert all("forward" not in vars(block) for block in model.blocks)
    recompute_(model, plan)


def test_blocks_are_found_once_and_not_inside_each_other():
    assert find_segments(build("resnet18")) == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert find_segments(encoder()) == [f"layers.{index}" for index in range(4)]
    with pytest.raises(ConfigError, match="has no list of repeated blocks"):
        find_segments(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5])
def test_a_budget_that_is_no_share_is_refused(budget):
    with pytest.raises(ConfigError, match="is not a share"):
        plan_recomputation(Net().train(), (torch.ones(1, 3, 8, 8),), memory_budget=budget)
    with pytest.raises(ConfigError, match="is not a share"):
        inductor_with_budget(budget)


def test_bad_segments_are_refused():
    model, x = Net().train(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="inside segment"):
        plan_recomputation(model, (x,), memory_budget=0.5, segments=["blocks.0", "blocks.0.0"])
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="does not run"):
        plan_recomputation(model, (x,), memory_budget=0.5, segments=["unused"])
    with pytest.raises(ConfigError, match=r"call model.train\(\)"):
        plan_recomputation(model.eval(), (x,), memory_budget=0.5)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x):
            return self.block(self.block(x))

    with pytest.raises(ConfigError, match="more than once"):
        plan_recomputation(Twice(), (torch.ones(1, 4),), memory_budget=0.5, segments=["block"])


@pytest.mark.slow
def test_compiled_code_keeps_less_under_a_budget():
    torch.manual_seed(0)
    layers = [each for _ in range(6) for each in (nn.Linear(64, 64), nn.GELU())]
    model, x = nn.Sequential(*layers), torch.randn(512, 64)
    kept = {}
    for budget in (1.0, 0.3):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=inductor_with_budget(budget))
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = F.mse_loss(compiled(x), torch.zeros_like(x))
        kept[budget] = sum(saved.values())
        loss.backward()
    assert kept[0.3] < 0.6 * kept[1.0]
