"""`prepare` changes nothing but what it says: the result equals the loop written out by hand."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import deepseek as ds
from deepseek.core.errors import ConfigError


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))


def make_loader() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 8, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(6)]


def test_prepared_loop_equals_the_loop_written_out() -> None:
    by_hand = make_model()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1.0)
    for inputs, targets in make_loader():
        with torch.autocast("cpu", torch.bfloat16):
            outputs = by_hand(inputs)
        nn.functional.cross_entropy(outputs.float(), targets).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    same_model, same_optimizer, loader = ds.prepare(model, optimizer, make_loader(), precision="bf16", grad_clip=0.1)
    assert same_model is model
    assert same_optimizer is optimizer
    assert len(loader) == 6
    for inputs, targets in loader:
        outputs = model(inputs)
        assert outputs.dtype == torch.bfloat16
        nn.functional.cross_entropy(outputs.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert list(model.state_dict()) == list(by_hand.state_dict())


def test_loader_moves_tensors_wherever_they_are() -> None:
    @dataclass(frozen=True)
    class Pair:
        tokens: Tensor
        name: str

    model = make_model()
    batch = {"x": [torch.ones(1)], "pair": Pair(torch.ones(2), "a")}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, _, loader = ds.prepare(model, optimizer, [batch], device="meta")
    (moved,) = loader
    assert moved["x"][0].device.type == "meta"
    assert moved["pair"].tokens.device.type == "meta"
    assert moved["pair"].name == "a"
    assert batch["x"][0].device.type == "cpu"


def test_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.SGD(make_model().parameters(), lr=1.0)
    with pytest.raises(ConfigError, match="does not have"):
        ds.prepare(make_model(), optimizer, make_loader())


class Net(nn.Module):
    """At the top of a module, so that it can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x) * scale


def prepared(model: nn.Module, **settings: Any) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, _, _ = ds.prepare(model, optimizer, make_loader(), **settings)
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: through_a_file(model),
    "EMA": lambda model: AveragedModel(model).module,
}


def through_a_file(model: nn.Module) -> nn.Module:
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_copy_computes_with_its_own_weights_under_the_policy(
    copy_of: Callable[[nn.Module], nn.Module], compile: bool
) -> None:
    if compile and copy_of is not COPIES["deepcopy"]:
        pytest.skip("torch itself does not pickle a compiled module")
    model = prepared(Net(), precision="bf16", compile=compile)
    x = torch.randn(4, 8)
    own = copy_of(model)
    assert type(own) is Net
    assert torch.equal(own(x), model(x))
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    assert own(x).abs().max() == 0
    assert own(x).dtype == torch.bfloat16
    assert model(x).abs().max() > 0


def test_a_part_of_a_copied_model_follows_its_copy() -> None:
    part = prepared(Net(), precision="bf16")
    whole = nn.Sequential(part, nn.ReLU())
    own = copy.deepcopy(whole)
    nn.init.zeros_(own[0].layer.weight)
    nn.init.zeros_(own[0].layer.bias)
    assert own(torch.ones(2, 8)).abs().max() == 0
    assert whole(torch.ones(2, 8)).dtype == torch.bfloat16


def test_the_signature_of_a_prepared_forward_is_the_models() -> None:
    assert list(inspect.signature(prepared(Net(), precision="fp32").forward).parameters) == ["x", "scale"]


def test_a_forward_that_stood_on_the_instance_still_runs() -> None:
    model = Net()
    model.forward = types.MethodType(lambda self, x: self.layer(x) + 100, model)
    prepared(model, precision="bf16")
    assert model(torch.zeros(1, 8)).min() > 50
    assert model(torch.zeros(1, 8)).dtype == torch.bfloat16


def test_a_loader_can_be_copied_and_pickled() -> None:
    model = make_model()
    _, _, loader = ds.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), make_loader())
    for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert type(other) is type(loader)
        assert len(list(other)) == 6
    with pytest.raises(AttributeError, match="nothing"):
        _ = loader.nothing


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_step_with_a_closure_clips_what_each_evaluation_computes(as_keyword: bool) -> None:
    """LBFGS evaluates several times within a step; by hand one clips inside the closure."""
    inputs, targets = make_loader()[0]
    by_hand, model = make_model(), make_model()
    norms: list[float] = []

    def evaluate(network: nn.Module, optimizer: torch.optim.Optimizer, *, clips: bool) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(inputs), targets) * 50
            loss.backward()
            if clips:
                norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), 0.1)))
            return loss

        return closure

    optimizer = torch.optim.LBFGS(by_hand.parameters(), lr=0.5, max_iter=4)
    optimizer.step(evaluate(by_hand, optimizer, clips=True))
    prepared_optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    ds.prepare(model, prepared_optimizer, make_loader(), precision="fp32", grad_clip=0.1)
    closure = evaluate(model, prepared_optimizer, clips=False)
    if as_keyword:
        prepared_optimizer.step(closure=closure)
    else:
        prepared_optimizer.step(closure)
    assert len(norms) == 4
    assert min(norms) > 0.1
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_prepared_again_the_last_policy_counts_and_nothing_is_nested() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ds.prepare(model, optimizer, [], precision="bf16")
    assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    ds.prepare(model, optimizer, [], precision="fp32")
    assert model(torch.ones(1, 2)).dtype == torch.float32


def test_a_model_without_parameters_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="the optimizer updates parameters that the model does not have"):
        ds.prepare(nn.Identity(), torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), [])


def test_an_average_a_state_dict_and_a_scaler_follow_the_loop_written_out() -> None:
    """Weights, statistics and the moving average are those of a loop with its own clipping, at half the batches saved
    and loaded into another prepared model."""
    batches = [torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)) * 10 for seed in range(6)]

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def average(model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)

    model, optimizer, loader = ds.prepare(*build(0), batches, precision="fp32")
    plain, plain_optimizer = build(0)
    ema, plain_ema = average(model), average(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for index, batch in enumerate(loader):
        if index == 3:  # saved, and loaded into another one
            other, other_optimizer, _ = ds.prepare(*build(1), batches, precision="fp32")
            other.load_state_dict(model.state_dict())
            other_optimizer.load_state_dict(optimizer.state_dict())
            model, optimizer = other, other_optimizer
        optimizer.zero_grad()
        scaler.scale(model(batch).square().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(model)
        plain_optimizer.zero_grad()
        plain(batch).square().sum().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
        plain_ema.update_parameters(plain)
    for got, want in zip(ema.state_dict().values(), plain_ema.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


PAIR_COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "old pickle": lambda pair: pickle.loads(pickle.dumps(pair, protocol=2)),
    "pickle in Python": lambda pair: pickle._loads(pickle._dumps(pair)),
    "torch.save": lambda pair: through_a_file(pair),
    "copied twice": lambda pair: copy.deepcopy(pickle.loads(pickle.dumps(pair))),
}
OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
    "two groups": lambda model: torch.optim.SGD([{"params": [each], "lr": 1.0} for each in model.parameters()]),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1.0),
}


def gradients_after_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of the gradients that the step saw; the loss makes them large."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).sum() * 1e4
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()


@pytest.mark.parametrize("copy_of", PAIR_COPIES.values(), ids=PAIR_COPIES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_copied_pair_of_model_and_optimizer_clips_still(
    copy_of: Callable[[Any], Any], make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    model = Net()
    optimizer = make(model)
    ds.prepare(model, optimizer, make_loader(), precision="fp32", grad_clip=0.25)
    own, own_optimizer = copy_of((model, optimizer))
    assert type(own_optimizer) is type(optimizer)
    before = [parameter.clone() for parameter in model.parameters()]
    torch.testing.assert_close(gradients_after_a_step(own, own_optimizer), torch.tensor(0.25), rtol=1e-4, atol=0)
    assert all(map(torch.equal, before, model.parameters()))  # the step was the copy's alone
    torch.testing.assert_close(gradients_after_a_step(model, optimizer), torch.tensor(0.25), rtol=1e-4, atol=0)


def test_without_clipping_nothing_is_added_to_an_optimizer() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    names = set(vars(optimizer))
    ds.prepare(model, optimizer, make_loader(), precision="fp32", grad_clip=None)
    assert set(vars(optimizer)) == names
    assert gradients_after_a_step(*copy.deepcopy((model, optimizer))) > 1e4


WAYS = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "trace": lambda model, x: torch.jit.trace(model, (x,)),
    "compile": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_prepared_model_is_exported_and_traced_under_its_policy(
    way: Callable[..., nn.Module], precision: str
) -> None:
    model = prepared(Net(), precision=precision).eval()
    x = torch.randn(4, 8)
    other = way(model, x)
    assert torch.equal(other(x + 1), model(x + 1))
    assert other(x).dtype is (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_a_prepared_model_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"script the model before ds\.prepare"):
        torch.jit.script(prepared(Net(), precision="bf16"))
