import copy

import pytest
import torch
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.mixed_precision import GradScaler, PrecisionManager
from deepseek.mixed_precision.manager import resolve_precision, tf32_matmuls

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


@pytest.mark.parametrize("precision", DTYPES)
def test_it_answers_as_autocast_does(precision):
    model, x = build(), torch.randn(3, 8)
    manager = PrecisionManager(model, precision=precision, level="O1")
    with torch.autocast("cpu", dtype=DTYPES[precision]):
        expected = model(x)
    assert torch.equal(manager.forward(x), expected) and torch.equal(manager(x), expected)
    with manager:
        assert torch.equal(model(x), expected)
        with manager:  # contexts may be nested
            assert torch.equal(model(x), expected)
    assert model(x).dtype == torch.float32


def test_at_o0_nothing_is_narrow_even_where_autocast_surrounds_it():
    manager = PrecisionManager(build(), precision="bf16", level="O0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert manager(torch.randn(3, 8)).dtype == torch.float32
    assert {each.dtype for each in manager.fp16_params} == {torch.float32}


def test_the_level_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("DS_AMP_LEVEL", "O0")
    assert PrecisionManager(build(), precision="bf16").precision == "fp32"


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_fp16_params_are_the_weights_rounded(level):
    model = build()
    exact = [each.detach().clone() for each in model.parameters()]
    manager = PrecisionManager(model, precision="fp16", level=level)
    for narrow, wide in zip(manager.fp16_params, exact, strict=True):
        assert torch.equal(narrow.float(), wide.half().float())
    assert (model[0].weight.dtype == torch.float16) == (level == "O2")
    assert model[1].weight.dtype == torch.float32  # a norm's


def test_masters_keep_updates_that_16_bits_would_lose():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    manager = PrecisionManager(model, precision="bf16", level="O2")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    manager.use_masters_(optimizer)
    for _ in range(100):
        manager(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (master,) = manager.master_params
    assert master.item() == pytest.approx(0.9, abs=1e-5)  # 100 steps of 0.001
    assert model.weight.item() == torch.tensor(0.9).bfloat16().item()
    alone = torch.ones((), dtype=torch.bfloat16)
    for _ in range(100):
        alone -= 1e-3
    assert alone.item() == 1.0  # what would have become of it


def test_o2_accumulates_and_scales_like_fp32_with_rounded_weights():
    """Two micro-batches and a scaler at O2 against the same on FP32 copies of the rounded weights."""
    model = build()
    manager = PrecisionManager(model, precision="fp16", level="O2")
    reference = build()
    with torch.no_grad():
        for each in (*reference[0].parameters(), *reference[3].parameters()):
            each.copy_(each.half())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.use_masters_(optimizer)
    scaler = GradScaler(init_scale=2.0**8)
    for x in (torch.randn(4, 8), torch.randn(4, 8)):
        scaler.scale(manager(x).float().square().mean()).backward()
        reference(x).square().mean().backward()
    assert all(each.grad is None for each in model[0].parameters())
    scaler.unscale_(optimizer)
    for master, other in zip(manager.master_params, reference.parameters(), strict=True):
        assert master.grad.dtype == torch.float32
        torch.testing.assert_close(master.grad, other.grad, rtol=0.05, atol=2e-3)
    scaler.step(optimizer)
    for narrow, master in zip(model.parameters(), manager.master_params, strict=True):
        assert torch.equal(narrow, master.to(narrow.dtype))


def test_masters_come_back_from_a_state():
    manager = PrecisionManager(build(), precision="bf16", level="O2")
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.1)
    manager.use_masters_(optimizer)
    manager(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(manager.state_dict())
    again = PrecisionManager(build(), precision="bf16", level="O2")
    again.load_state_dict(state)
    for mine, other in zip(manager.master_params[:2], again.master_params[:2], strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(manager.model[0].weight, again.model[0].weight)
    with pytest.raises(ConfigError, match="load it into the same model at level O2"):
        PrecisionManager(build(), precision="bf16", level="O1").load_state_dict(state)


def test_an_optimizer_that_has_stepped_is_refused():
    manager = PrecisionManager(build(), precision="bf16", level="O2")
    optimizer = torch.optim.AdamW(manager.model.parameters())
    manager.model[1].weight.grad = torch.ones(16)
    optimizer.step()
    with pytest.raises(ConfigError, match="before its first step"):
        manager.use_masters_(optimizer)


@pytest.mark.parametrize(
    ("is_faster", "device", "expected"), [(True, "cpu", "bf16"), (False, "cpu", "fp32"), (False, "cuda", "fp16")]
)
def test_auto_takes_what_pays_on_the_device(monkeypatch, is_faster, device, expected):
    monkeypatch.setattr("deepseek.mixed_precision.manager.is_bf16_faster", lambda device: is_faster)
    assert resolve_precision("auto", torch.device(device)) == expected


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match=r"'tf32' was asked for and cpu does not have it .* choose 'bf16'"):
        PrecisionManager(build(), precision="tf32")


def test_tf32_is_set_inside_and_set_back_outside():
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [each.fp32_precision for each in settings]
    with pytest.raises(KeyError), tf32_matmuls():
        assert [each.fp32_precision for each in settings] == ["tf32", "tf32"]
        raise KeyError
    assert [each.fp32_precision for each in settings] == before


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="unknown precision 'fp61'; did you mean 'fp16'"):
        PrecisionManager(build(), precision="fp61")
