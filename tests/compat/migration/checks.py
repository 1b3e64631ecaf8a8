"""What the tests of migrations share: findings of one text, a project to migrate, and a malicious object."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deepseek.compat.migration.config_files import check_config
from deepseek.compat.migration.findings import Finding, apply_edits
from deepseek.compat.migration.python_files import check_python
from deepseek.compat.migration.rules import load_rules
from deepseek.compat.migration.scanning import scan
from deepseek.compat.version_converter import VersionConverter
from tests.compat.models import build

RULES = load_rules()


def config_findings(text: str, suffix: str = ".yaml", rules: Any = RULES) -> list[Finding]:
    return check_config(text, "x", suffix, rules, "5.0", is_named=True)


def python_findings(text: str) -> list[Finding]:
    return check_python(text.encode(), "x.py", RULES.python)


def settle(text: str, check: Any) -> str:
    """Apply until nothing is left to apply, as `--apply` does."""
    for _ in range(10):
        changed = apply_edits(text, check(text))
        if changed == text:
            break
        text = changed
    return text


def found(path: Path, target: str = "v5.0", source: str | None = None) -> list[Finding]:
    return [each for scanned in scan(path, target, source) for each in scanned.findings]


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def save_old_llama(folder: Path) -> dict[str, torch.Tensor]:
    weights = VersionConverter("5.0", "3.0").convert(build("llama").state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    return weights


def make_project(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("generation: v2.0  # ours\nfp16: true\ndistributed:\n  tensor_parallel: 2\n")
    (folder / "train.py").write_text("import numpy as np\n\nx = np.float(1)   # keep\n")
    save_old_llama(folder / "weights")
    build("llama").config.save_pretrained(folder / "weights")
    torch.save(build("gpt2").state_dict(), folder / "model.pt")
    (folder / "README.md").write_text("np.float")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}
