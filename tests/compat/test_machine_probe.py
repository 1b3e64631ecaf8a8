"""The machine is described as other sources describe it."""

from __future__ import annotations

import json
import os
import platform
import resource
from pathlib import Path

import psutil
import pytest
import torch

from deepseek.compat.compatibility import check_compatibility
from deepseek.compat.machine_probe import Gpu, probe_machine


def test_this_machine_is_told_as_other_sources_tell_it() -> None:
    machine = probe_machine()
    assert machine.python == platform.python_version()
    assert machine.torch == torch.__version__
    assert machine.memory_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert machine.num_file_descriptors == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert bool(machine.gpus) == torch.cuda.is_available()


def fake_program(folder: Path, name: str, text: str, status: int = 0) -> None:
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    (folder / name).chmod(0o755)


def test_drivers_and_clusters_are_asked_through_their_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(tmp_path, "nvidia-smi", "535.104.05, NVIDIA A100-SXM4-80GB, 81920, 8.0\nbroken line")
    fake_program(tmp_path, "kubectl", json.dumps({"serverVersion": {"gitVersion": "v1.29.3"}}))
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    machine = probe_machine()
    assert (machine.cuda_driver, machine.kubernetes) == ("535.104.05", "1.29.3")
    assert machine.gpus == (Gpu(name="NVIDIA A100-SXM4-80GB", memory_bytes=81920 << 20, compute_capability="8.0"),)


@pytest.mark.parametrize(("text", "status"), [("not json", 0), ("[]", 0), ("{}", 1)])
def test_a_program_that_answers_nonsense_counts_as_absent(
    text: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_program(tmp_path, "nvidia-smi", text, status)
    fake_program(tmp_path, "kubectl", text, status)
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    machine = probe_machine()
    assert (machine.cuda_driver, machine.kubernetes, machine.gpus) == (None, None, ())
    (kubernetes,) = (check for check in check_compatibility(machine) if check.name == "Kubernetes")
    assert kubernetes.status == "failing"
