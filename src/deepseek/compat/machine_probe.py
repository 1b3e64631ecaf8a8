"""Describe this machine once, in one frozen value, so that judging it needs no machine.

Nothing here raises for an absent thing: it is `None`. Other programs (`nvidia-smi`, `kubectl`) are asked
with a time limit, and `kubectl` only where a kubeconfig says that there is a cluster.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from deepseek.core.config import Config
from deepseek.core.machine import describe_machine, list_processor_flags

_TIMEOUT_S = 10
CPU_FEATURES = {"AVX-512": "avx512f", "VNNI": "avx512_vnni", "BF16": "avx512_bf16", "AMX": "amx_tile"}
COMPILERS = ("g++", "clang++", "nvcc", "hipcc")
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tvm": "TVM", "torchao": "torchao"}


class Gpu(Config):
    """One device as its driver describes it."""

    name: str
    memory_bytes: int
    compute_capability: str | None = None


class Machine(Config):
    """The properties that the rules of `compatibility` look at."""

    python: str
    torch: str | None = None
    torch_cuda: str | None = None
    """CUDA runtime that torch was built with."""
    torch_rocm: str | None = None
    cuda_driver: str | None = None
    nccl: str | None = None
    gpus: tuple[Gpu, ...] = ()
    memory_bytes: int
    cpu_features: tuple[str, ...] = ()
    compilers: tuple[str, ...] = ()
    shared_memory_bytes: int | None = None
    num_file_descriptors: int | None = None
    runtimes: tuple[str, ...] = ()
    has_kubeconfig: bool = False
    kubernetes: str | None = None
    """Version of the cluster's server; `None` where there is none or it does not answer."""


def probe_machine() -> Machine:
    """Describe this machine as it is now. Costs the import of torch, and seconds for a driver or a cluster."""
    has_kubeconfig = _kubeconfig().exists()
    return Machine(
        python=platform.python_version(),
        **_torch(),
        **_nvidia(),
        memory_bytes=describe_machine()["memory_bytes"],
        cpu_features=_cpu_features(),
        compilers=tuple(compiler for compiler in COMPILERS if shutil.which(compiler)),
        shared_memory_bytes=_shared_memory_bytes(),
        num_file_descriptors=_num_file_descriptors(),
        runtimes=tuple(name for module, name in RUNTIMES.items() if importlib.util.find_spec(module)),
        has_kubeconfig=has_kubeconfig,
        kubernetes=_kubernetes() if has_kubeconfig else None,
    )


def _torch() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    nccl = None
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "torch_rocm": torch.version.hip, "nccl": nccl}


def _nvidia() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    rows = [[cell.strip() for cell in line.split(",")] for line in _ask(query).splitlines()]
    complete = [row for row in rows if len(row) == 4 and row[2].isdigit()]
    if not complete:
        return {}
    gpus = [Gpu(name=name, memory_bytes=int(size) << 20, compute_capability=cap) for _, name, size, cap in complete]
    return {"cuda_driver": complete[0][0], "gpus": tuple(gpus)}


def _cpu_features() -> tuple[str, ...]:
    flags = list_processor_flags()
    return tuple(name for name, flag in CPU_FEATURES.items() if flag in flags)


def _shared_memory_bytes() -> int | None:
    folder = Path("/dev/shm")  # noqa: S108 - measured, not written
    return shutil.disk_usage(folder).total if folder.exists() else None


def _num_file_descriptors() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _kubeconfig() -> Path:
    return Path(os.environ.get("KUBECONFIG", "").split(os.pathsep)[0] or Path.home() / ".kube" / "config")


def _kubernetes() -> str | None:
    answer = _ask(["kubectl", "version", "--output=json", f"--request-timeout={_TIMEOUT_S}s"])
    try:
        version = json.loads(answer or "{}").get("serverVersion", {}).get("gitVersion")
    except (json.JSONDecodeError, AttributeError):
        return None
    return str(version).removeprefix("v") if version else None


def _ask(command: list[str]) -> str:
    """Return what a program prints; nothing when it is absent, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout  # noqa: S603
    except (subprocess.SubprocessError, OSError):
        return ""
