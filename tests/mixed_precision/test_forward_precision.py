from pathlib import Path

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.mixed_precision import forward_precision
from deepseek.mixed_precision.forward_precision import (
    autocast,
    choose_precision,
    has_native_bf16,
    measure_bf16_speedup,
    one_thread,
)

CPU = torch.device("cpu")


def claim(monkeypatch, *, avx512=False, amx=False, cuda=False, speedup=2.0):
    """A machine with or without the instructions; the calls are torch's own questions to it, and our measurement."""
    monkeypatch.setattr(forward_precision, "measure_bf16_speedup", lambda: speedup)
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
        ({"avx512": True, "speedup": 0.55}, "cpu", "fp32"),
        ({"avx512": True, "speedup": 1.01}, "cpu", "fp32"),
        ({"speedup": 2.0}, "cpu", "fp32"),
        ({"cuda": True, "speedup": 0.55}, "cuda", "bf16"),
        ({"avx512": True}, "cuda", "fp32"),
        ({"cuda": True}, "cuda", "bf16"),
        ({"cuda": True, "avx512": True}, "mps", "fp32"),
    ],
)
def test_auto_is_bf16_where_that_is_faster(monkeypatch, hardware, device, expected):
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


class Clock:
    """Time that passes only where a test lets it."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.mark.parametrize(("fp32_s", "bf16_s"), [(4.0, 1.0), (1.0, 2.0)])
def test_the_speedup_is_of_the_two_matmuls_and_of_their_shortest_runs(monkeypatch, fp32_s, bf16_s):
    clock, runs = Clock(), []

    class Timed(torch.Tensor):
        """A matrix that takes its time, and now and then the time of a neighbor as well."""

        def __matmul__(self, other):
            runs.append((self.dtype, torch.get_num_threads(), torch.is_autocast_enabled("cpu")))
            disturbed_s = 10.0 if len(runs) % 3 == 0 else 0.0
            clock.now_s += disturbed_s + (fp32_s if self.dtype == torch.float32 else bf16_s)
            return self

    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, **named: full(*args, **named).as_subclass(Timed))
    monkeypatch.setattr(forward_precision.time, "perf_counter", clock)
    num_threads = torch.get_num_threads()
    with torch.autocast("cpu", torch.bfloat16):
        assert measure_bf16_speedup.__wrapped__() == fp32_s / bf16_s
    assert {dtype for dtype, *_ in runs} == {torch.float32, torch.bfloat16}
    assert {(num_threads, is_autocast) for _, num_threads, is_autocast in runs} == {(1, False)}
    assert torch.get_num_threads() == num_threads


def test_measuring_draws_no_random_numbers_and_happens_once(monkeypatch):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = measure_bf16_speedup()
    assert torch.equal(torch.rand(1), expected)
    monkeypatch.setattr(torch, "full", None)  # a second measurement would fail
    assert measure_bf16_speedup() == first > 0


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
