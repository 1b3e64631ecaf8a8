"""A migrated copy is clean, and the original stays as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek.cli.verbs.migrate import migrate as run
from deepseek.compat.migration.applying import migrate
from deepseek.compat.sharded_checkpoints import convert_files
from deepseek.compat.version_converter import VersionConverter
from tests.compat.migration.checks import (
    found,
    make_project,
    snapshot,
)
from tests.compat.models import build
from tests.compat.test_sharded_checkpoints import save_model


def test_a_coding_line_is_honoured(tmp_path: Path) -> None:
    content = "# coding: latin-1\nimport numpy as np\nx = np.float; s = 'ä'\n".encode("latin-1")
    (tmp_path / "a.py").write_bytes(content)
    assert migrate(tmp_path, tmp_path.parent / "out-latin", "v5.0") == []
    assert (tmp_path.parent / "out-latin" / "a.py").read_bytes() == content.replace(b"np.float", b"float")


def test_apply_writes_a_clean_copy_and_leaves_the_original(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    before = snapshot(project)
    assert run(project) == 1
    assert run(project, apply=True, out=tmp_path / "out") == 0
    assert snapshot(project) == before
    out = tmp_path / "out"
    assert (out / "config.yaml").read_text() == (
        "generation: v5.0  # ours\nds_amp_level: O1\nmodel_parallel:\n  tensor_parallel_size: 2\n"
    )
    assert (out / "train.py").read_text() == "import numpy as np\n\nx = float(1)   # keep\n"
    assert load_file(out / "weights" / "model.safetensors").keys() == build("llama").state_dict().keys()
    assert not (out / "model.pt").exists()
    assert load_file(out / "model.safetensors").keys() == build("gpt2").state_dict().keys()


def test_applying_twice_changes_nothing(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    migrate(project, tmp_path / "once", "v5.0")
    migrate(tmp_path / "once", tmp_path / "twice", "v5.0")
    assert snapshot(tmp_path / "twice") == snapshot(tmp_path / "once")


def test_links_neither_loop_nor_lead_the_copy_outside(tmp_path: Path) -> None:
    project, outside = make_project(tmp_path / "project"), tmp_path / "outside"
    outside.mkdir()
    (outside / "c.yaml").write_text("gradient_clip: 1.0\n")
    (project / "loop").symlink_to(project)
    (project / "away").symlink_to(outside)
    (project / "broken.yaml").symlink_to(tmp_path / "nothing")
    findings = found(project)
    assert "away/c.yaml" in [each.path for each in findings]
    assert [each.path for each in findings if each.is_unreadable] == ["broken.yaml"]
    migrate(project, tmp_path / "out", "v5.0")
    assert (outside / "c.yaml").read_text() == "gradient_clip: 1.0\n"


def test_modes_links_and_foreign_files_are_kept(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "run.py").write_text("#!/usr/bin/env python\nimport numpy as np\nx = np.float\n")
    (project / "run.py").chmod(0o755)
    (project / "read-only.yaml").write_text("gradient_clip: 1\n")
    (project / "read-only.yaml").chmod(0o444)
    (project / "link.py").symlink_to("run.py")
    (project / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(project / "pipe.yaml")
    os.mkfifo(project / "pipe.safetensors")
    (project / "notes.bin").write_bytes(b"\x00\x01")
    left = migrate(project, tmp_path / "out", "v5.0")
    out = tmp_path / "out"
    assert (out / "run.py").stat().st_mode & 0o777 == 0o755
    assert (out / "read-only.yaml").stat().st_mode & 0o777 == 0o444
    assert (out / "read-only.yaml").read_text() == "ds_grad_clip: 1\n"
    assert (out / "link.py").readlink() == Path("run.py")
    assert (out / "link.py").read_text().endswith("x = float\n")
    assert (out / "dangling.txt").readlink() == Path("nowhere")
    assert (out / "notes.bin").read_bytes() == b"\x00\x01"
    assert left == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_the_encoding_of_a_config_is_kept(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("gradient_clip: 1 # é\r\n".encode(encoding))
    assert migrate(tmp_path, tmp_path.parent / f"out-{encoding}", "v5.0") == []
    assert (tmp_path.parent / f"out-{encoding}" / "c.yaml").read_bytes() == "ds_grad_clip: 1 # é\r\n".encode(encoding)


def test_weights_beside_a_sharded_checkpoint_are_carried(tmp_path: Path) -> None:
    model = build("llama")
    old = tmp_path / "project" / "weights"
    convert_files(VersionConverter("5.0", "3.5"), save_model(model, tmp_path / "new"), old, max_shard_bytes=3000)
    save_file({"state": torch.ones(2)}, old / "optimizer.safetensors")
    assert migrate(tmp_path / "project", tmp_path / "out", "v5.0") == []
    out = tmp_path / "out" / "weights"
    assert torch.equal(load_file(out / "optimizer.safetensors")["state"], torch.ones(2))
    assert type(model).from_pretrained(out, use_safetensors=True).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"w": torch.ones(1)}, "optimizer": {"step": 3}},
        {"w": torch.ones(1), "epoch": 3},
        {"w": torch.ones(2).to_sparse()},
        {"w": torch.ones(1, dtype=torch.complex64)},
        {0: torch.ones(1)},
        [torch.ones(1)],
    ],
)
def test_a_pickle_that_holds_more_than_weights_stays_as_it_is(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    (left,) = migrate(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", "v5.0")
    assert (left.rule, left.is_fixable) == ("checkpoint-pickle", False)
    copy = tmp_path.parent / f"{tmp_path.name}-out" / "model.pt"
    assert copy.read_bytes() == (tmp_path / "model.pt").read_bytes()


def test_a_pickle_that_a_program_loads_by_name_stays(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    torch.save({"w": torch.ones(1)}, project / "model.pt")
    (project / "run.py").write_text("import torch\nprint(torch.load('model.pt'))\n")
    left = migrate(project, tmp_path / "out", "v5.0")
    assert [finding.rule for finding in left] == ["checkpoint-pickle"]
    program = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    assert "tensor([1.])" in program.stdout


def test_a_setting_changes_together_with_the_code_that_reads_it(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "c.yaml").write_text("gradient_clip: 1\naccum_steps: 2\nfp16: true\n")
    (project / "run.py").write_text("\nprint(settings['gradient_clip'])\n")
    (left,) = migrate(project, tmp_path / "out", "v5.0")
    assert "run.py:2 reads it by this name" in left.why
    assert (tmp_path / "out" / "c.yaml").read_text() == "gradient_clip: 1\naccum_steps: 2\nds_amp_level: O1\n"


PROGRAM = '''#!/usr/bin/env python
"""Every rule of Python whose result a program can show.

from nowhere import nothing
"""
from __future__ import annotations

import warnings
warnings.simplefilter("ignore")
import numpy as np, torch
import torch.nn as nn
from torch.cuda.amp import GradScaler, autocast
from torch.cpu.amp import autocast as cpu_autocast
from torch.cuda import amp

flag = False
a, b = torch.eye(2), torch.tensor([3.0, 4.0])
with autocast(flag), torch.cuda.amp.autocast(dtype=torch.float16, enabled=flag), amp.autocast((flag), torch.bfloat16):
    print((a @ a).dtype)
with cpu_autocast():
    print((a @ a).dtype)
with cpu_autocast(True, torch.float16):
    print((a @ a).dtype)
scaler = GradScaler(4.0, enabled=False)
print(f"{torch.cuda.amp.GradScaler(enabled=False).get_scale():.1f}", scaler.is_enabled(), scaler.state_dict())
b.grad = torch.tensor([3.0, 4.0])
torch.save({"w": b}, "w.pt")
print(torch.load("w.pt")["w"].tolist(), torch.load(("w.pt"), "cpu", mmap=True,)["w"].tolist())
'''


def test_a_program_that_uses_the_rules_does_the_same_afterwards(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "run.py").write_text(PROGRAM)
    assert migrate(project, tmp_path / "out", "v5.0") == []
    assert (tmp_path / "out" / "run.py").read_text() != PROGRAM
    outputs = []
    for folder in (project, tmp_path / "out"):
        command = [sys.executable, "run.py"]
        outputs.append(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].count("\n") == 5
