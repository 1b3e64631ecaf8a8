from pathlib import Path

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.mixed_precision.forward_precision import autocast, choose_precision, has_native_bf16

CPU = torch.device("cpu")


def claim(monkeypatch, *, avx512=False, amx=False, cuda=False):
    """A machine with or without the instructions; the calls are torch's own questions to it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda)


def test_it_is_what_the_kernel_says_of_this_cpu():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_native_bf16(CPU) == ("avx512_bf16" in flags or "amx_tile" in flags)


@pytest.mark.parametrize(
    ("hardware", "device", "expected"),
    [
        ({}, "cpu", "fp32"),
        ({"avx512": True}, "cpu", "bf16"),
        ({"amx": True}, "cpu", "bf16"),
        ({"avx512": True}, "cuda", "fp32"),
        ({"cuda": True}, "cuda", "bf16"),
        ({"cuda": True, "avx512": True}, "mps", "fp32"),
    ],
)
def test_auto_is_bf16_where_the_hardware_has_it(monkeypatch, hardware, device, expected):
    claim(monkeypatch, **hardware)
    assert choose_precision("auto", torch.device(device)) == expected


def test_what_is_asked_for_by_name_is_what_runs(monkeypatch):
    claim(monkeypatch)
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"  # slow without the instructions, and right


def test_a_gpu_without_bf16_is_not_given_it(monkeypatch):
    claim(monkeypatch)
    with pytest.raises(ConfigError, match="'bf16' was asked for and cuda:0 has no bf16 arithmetic; choose 'fp32'"):
        choose_precision("bf16", torch.device("cuda:0"))


@pytest.mark.parametrize("precision", ["fp16", "bf61", "", "BF16"])
def test_an_unknown_policy_is_refused_and_never_taken_for_another(precision):
    for choose in (choose_precision, autocast):
        with pytest.raises(ConfigError, match=r"unknown precision .*known: auto, bf16, fp32"):
            choose(precision, CPU)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_run_in_the_policys_dtype_and_weights_stay_float32(precision, dtype):
    layer = torch.nn.Linear(4, 4)
    with autocast(precision, CPU):
        y = layer(torch.ones(2, 4))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_auto_runs_what_auto_chooses(monkeypatch):
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        claim(monkeypatch, avx512=has_bf16)
        with autocast("auto", CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_fp32_does_not_end_somebody_elses_autocast():
    with torch.autocast("cpu", torch.bfloat16), autocast("fp32", CPU):
        assert torch.is_autocast_enabled("cpu")
