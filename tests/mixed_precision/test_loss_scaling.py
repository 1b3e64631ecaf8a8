import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek.checkpoint.structure import flatten, unflatten
from deepseek.core.errors import ConfigError
from deepseek.mixed_precision import GradScaler
from tests.mixed_precision.ranks import run_on_ranks

SETTINGS = {"init_scale": 2.0**10, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}


def build(optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, optimizer(model.parameters(), lr=0.1, **options)


def take_step(scaler, model, optimizer, x, *, poison=None, clip=False):
    """One iteration as the documentation writes it; returns what there is to compare."""
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    if poison is not None:
        model[0].weight.grad[0, 0] = poison
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    answer = scaler.step(optimizer)
    scaler.update()
    return answer, scaler.get_scale(), scaler.state_dict()


# Not the fused SGD with momentum: where its first step is skipped, torch leaves the momentum as memory was.
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"optimizer": torch.optim.AdamW, "fused": True}],
    ids=["plain", "fused"],
)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, None, torch.inf, torch.nan]), st.booleans()), max_size=12))
def test_each_step_gives_torchs_numbers(options, steps):
    ours, theirs = build(**options), build(**options)
    scaler, reference = GradScaler(**SETTINGS), torch.amp.GradScaler("cpu", **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for poison, clip in steps:
        x = torch.randn(3, 4, generator=generator)
        got = take_step(scaler, *ours, x, poison=poison, clip=clip)
        assert got == take_step(reference, *theirs, x, poison=poison, clip=clip)
        for mine, other in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
            assert torch.equal(mine, other)


def test_the_defaults_are_the_specified_ones():
    assert GradScaler().state_dict() == {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }
    assert GradScaler(2.0**8, 4.0, 0.25, 7).state_dict()["growth_interval"] == 7
    assert isinstance(GradScaler(), torch.amp.GradScaler)


def test_lists_of_outputs_are_scaled_alike():
    scaler = GradScaler(init_scale=4.0)
    assert scaler.scale([torch.tensor(1.0), (torch.tensor(2.0),)]) == [torch.tensor(4.0), (torch.tensor(8.0),)]
    with pytest.raises(ValueError, match="Tensor or an iterable"):
        scaler.scale(3.0)


@pytest.mark.parametrize("calls", [("unscale", "unscale"), ("step", "step"), ("step", "unscale")], ids="-".join)
def test_calls_out_of_order_are_refused_in_torchs_words(calls):
    messages = []
    for make in (GradScaler, lambda: torch.amp.GradScaler("cpu")):
        scaler, (model, optimizer) = make(), build()
        scaler.scale(model(torch.ones(1, 4)).sum()).backward()
        run = {"unscale": scaler.unscale_, "step": scaler.step}
        run[calls[0]](optimizer)
        with pytest.raises(RuntimeError) as caught:
            run[calls[1]](optimizer)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_step_without_scaled_gradients_is_refused():
    scaler, (_, optimizer) = GradScaler(), build()
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    scaler.scale(torch.ones(()))
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_fp16_gradients_are_refused():
    scaler, (model, optimizer) = GradScaler(), build()
    model.half()
    scaler.scale(model(torch.ones(1, 4).half()).float().sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


def test_sparse_gradients_are_unscaled_and_checked():
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer, scaler = torch.optim.SGD(embedding.parameters(), lr=1.0), GradScaler(init_scale=8.0)
    scaler.scale(embedding(torch.tensor([1, 1])).sum()).backward()
    scaler.unscale_(optimizer)
    assert embedding.weight.grad.to_dense()[1].tolist() == [2.0] * 4


def test_several_optimizers_share_one_scale():
    scaler, first, second = GradScaler(init_scale=8.0), build(), build()
    scaler.scale(first[0](torch.ones(1, 4)).sum() + second[0](torch.ones(1, 4)).sum()).backward()
    second[0][0].weight.grad[0, 0] = torch.inf
    before = [each.clone() for each in second[0].parameters()]
    changed = first[0][0].weight.clone()
    for _, optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(map(torch.equal, before, second[0].parameters())) and not torch.equal(changed, first[0][0].weight)


def test_a_state_through_a_checkpoint_goes_on_with_the_same_numbers():
    scaler, (model, optimizer) = GradScaler(**SETTINGS), build()
    x = torch.ones(2, 4)
    for poison in (None, torch.inf, None, None):
        take_step(scaler, model, optimizer, x, poison=poison)
    structure, tensors = flatten(scaler.state_dict())
    again = GradScaler()
    again.load_state_dict(unflatten(structure, tensors))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for poison in (None, None, None, torch.nan):
        expected = take_step(scaler, model, optimizer, x, poison=poison)
        assert take_step(again, twin, twin_optimizer, x, poison=poison) == expected


def test_switched_off_it_does_nothing():
    scaler, (model, optimizer) = GradScaler(enabled=False), build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(scaler, model, optimizer, torch.ones(1, 4))
    assert scaler.get_scale() == 1.0 and scaler.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth_factor": 1.0}, "growth_factor is 1.0; give a number above 1"),
        ({"backoff_factor": 1.0}, "backoff_factor is 1.0; give a number between 0 and 1"),
        ({"init_scale": 0.0}, "init_scale is 0.0; give a positive number"),
        ({"growth_interval": 0}, "growth_interval is 0; give a number of steps"),
    ],
)
def test_factors_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GradScaler(**options)


SHARED = """
from torch import nn
from deepseek.mixed_precision import GradScaler
torch.manual_seed(0)
"""


def test_infinity_on_one_rank_skips_the_step_on_all(tmp_path):
    answers = run_on_ranks(
        SHARED
        + """
model = nn.Linear(2, 2)
answers = []
for fused in (False, True):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    for group in ("world", None):
        scaler = GradScaler(init_scale=8.0, group=group)
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        if rank == 1:
            model.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        answers.append((torch.equal(before, model.weight), scaler.get_scale()))
answer(answers)
""",
        2,
        tmp_path,
    )
    skipped, taken = [True, 4.0], [False, 8.0]
    assert answers[0] == [skipped, taken] * 2  # alone, rank 0 goes on: what the agreement is for
    assert answers[1] == [skipped, skipped] * 2


def test_a_rank_without_gradients_takes_part_in_the_agreement(tmp_path):
    answers = run_on_ranks(
        SHARED
        + """
model = nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
scaler = GradScaler(init_scale=8.0)
loss = scaler.scale(model(torch.ones(1, 2)).sum())
if rank == 0:
    loss.backward()
    model.weight.grad[0, 0] = torch.nan
scaler.step(optimizer)
scaler.update()
answer(scaler.get_scale())
""",
        2,
        tmp_path,
    )
    assert answers == [4.0, 4.0]


def test_sharded_gradients_are_unscaled_in_place_and_agreed_on(tmp_path):
    answers = run_on_ranks(
        SHARED
        + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
mesh = init_device_mesh("cpu", (2,))
weight = nn.Parameter(distribute_tensor(torch.arange(6.0).reshape(3, 2), mesh, [Shard(0)]))
optimizer = torch.optim.SGD([weight], lr=1.0)
scaler = GradScaler(init_scale=8.0)
answers = []
for poison in (False, True):
    optimizer.zero_grad()
    scaler.scale(torch.ones(()))
    weight.grad = distribute_tensor(torch.full((3, 2), 8.0), mesh, [Shard(0)])
    if poison and rank == 1:
        weight.grad.to_local()[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    gradient = weight.grad.full_tensor().sum().item()
    scaler.step(optimizer)
    scaler.update()
    answers.append((gradient if not poison else None, weight.full_tensor().tolist(), scaler.get_scale()))
answer(answers)
""",
        2,
        tmp_path,
    )
    stepped = (torch.arange(6.0).reshape(3, 2) - 1).tolist()
    assert answers[0] == answers[1] == [[6.0, stepped, 8.0], [None, stepped, 4.0]]
