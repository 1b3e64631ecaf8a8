"""`prepare` changes nothing but what it says: the result equals the loop written out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

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
