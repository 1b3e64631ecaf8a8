"""Machines of every kind are judged by their values, and this one by asking it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

import deepseek
from deepseek.compat.compatibility import Check, check_compatibility, get_version_info, is_at_least
from deepseek.compat.machine_probe import Gpu, Machine

LAPTOP = Machine(python="3.11.7", torch="2.13.0+cpu", memory_bytes=16 * 10**9, compilers=("g++",))


SERVER = Machine(
    python="3.12.1",
    torch="2.13.0+cu118",
    torch_cuda="11.8",
    cuda_driver="535.104.05",
    nccl="2.21.5",
    gpus=(Gpu(name="A100-80GB", memory_bytes=80 * 10**9, compute_capability="8.0"),),
    memory_bytes=512 * 10**9,
    cpu_features=("AVX-512", "VNNI"),
    compilers=("g++", "nvcc"),
    shared_memory_bytes=64 * 10**9,
    num_file_descriptors=65536,
    has_kubeconfig=True,
    kubernetes="1.29.3",
)


def line(machine: Machine, name: str) -> Check:
    return next(each for each in check_compatibility(machine) if each.name == name)


def test_a_server_runs_every_generation() -> None:
    checks = check_compatibility(SERVER)
    assert [each for each in checks if each.status in ("failing", "unmet")] == []
    assert sum(each.name.startswith("meets") for each in checks) == 10


def test_a_laptop_hears_what_5_0_and_4_0_would_need() -> None:
    assert "CUDA 11.6 or later" in str(line(LAPTOP, "meets 5.0").next_step)
    assert "KUBECONFIG" in str(line(LAPTOP, "meets 4.0").next_step)
    assert line(LAPTOP, "meets 2.3").status == "ok"


def test_what_a_generation_asks_for_fails_nothing_of_this_product() -> None:
    checks = check_compatibility(LAPTOP)
    assert checks[0] == Check(name="deepseek", seen=deepseek.__version__, status="ok")
    assert {each.status for each in checks if each.name.startswith("meets")} == {"ok", "unmet"}
    assert not [each for each in checks if each.status == "failing"]


def test_every_line_that_is_not_ok_has_a_next_step() -> None:
    small = LAPTOP.override(
        {"torch": None, "compilers": [], "shared_memory_bytes": 64_000_000, "num_file_descriptors": 256}
    )
    for machine in (LAPTOP, SERVER, small):
        assert all(each.next_step for each in check_compatibility(machine) if each.status != "ok")
    assert {each.name for each in check_compatibility(small) if each.status == "failing"} >= {
        "torch", "compilers", "shared memory", "file descriptors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cuda", "driver", "is_bad"),
    [
        ("11.7", "460.32.03", True),
        ("11.7", "470.57.02", False),
        ("11.6", "460.32.03", False),
        ("11.8", "460.32.03", False),
        ("12.8", "450.1", False),
        ("11.7.1", "470.57.01", True),
    ],
)
def test_the_known_bad_pair_of_the_documents_is_a_rule(cuda: str, driver: str, is_bad: bool) -> None:
    checks = check_compatibility(SERVER.override({"torch_cuda": cuda, "cuda_driver": driver}))
    bad = [each for each in checks if "CUDA_ERROR_INVALID_VALUE" in each.seen]
    assert bool(bad) == is_bad
    assert line(SERVER.override({"torch_cuda": cuda, "cuda_driver": driver}), "meets 5.0").status == (
        "unmet" if is_bad else "ok"
    )
    if is_bad:
        assert "CUDA 11.6, or a driver of at least 470.57.02" in str(bad[0].next_step)


@pytest.mark.parametrize(
    ("change", "name", "next_step"),
    [
        ({"torch_cuda": "11.3"}, "meets 5.0", "CUDA 11.6 or later"),
        ({"torch_cuda": "11.3"}, "meets 1.3", "CUDA 11.6 or ROCm 5.2"),
        ({"nccl": "2.11.4"}, "meets 1.3", "NCCL 2.12"),
        ({"torch_cuda": "11.7", "cuda_driver": "450.1"}, "meets 5.0", "driver of at least 470.57.02"),
        ({"kubernetes": "1.21.9"}, "meets 4.0", "1.22"),
        ({"kubernetes": None}, "Kubernetes", "kubectl version"),
        ({"torch_cuda": None}, "torch build", "CUDA or ROCm build"),
        ({"python": "3.9.2"}, "Python", "3.11"),
    ],
)
def test_requirements_of_the_documents_are_checked(change: dict[str, object], name: str, next_step: str) -> None:
    found = line(SERVER.override(change), name)
    assert found.status == ("unmet" if name.startswith("meets") else "failing")
    assert next_step in str(found.next_step)


def test_rocm_can_stand_in_where_the_documents_say_so() -> None:
    amd = SERVER.override({"torch_cuda": None, "torch_rocm": "5.5", "cuda_driver": None})
    assert line(amd, "meets 1.3").status == "ok"
    assert line(amd, "meets 5.0").status == "unmet"


versions = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))


@given(versions, versions)
def test_versions_compare_as_packaging_does(a: str, b: str) -> None:
    assert is_at_least(a, b) == (Version(a) >= Version(b))


def test_version_info_tells_the_truth_about_this_machine() -> None:
    info = get_version_info()
    assert set(info) == {"version", "cuda_version", "recommended_gpu", "new_features"}
    assert info["version"] == deepseek.__version__
    has_cuda = torch.cuda.is_available()
    assert info["cuda_version"] == (torch.version.cuda if has_cuda else None)
    assert (info["recommended_gpu"] is not None) == has_cuda
    assert "hardware-aware scheduling" in info["new_features"]
