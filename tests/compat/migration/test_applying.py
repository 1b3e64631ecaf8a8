"""A migrated copy is clean, and the original stays as it was."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from deepseek.cli.verbs.migrate import migrate as run
from deepseek.compat.migration.applying import migrate
from tests.compat.migration.checks import (
    found,
    make_project,
    snapshot,
)
from tests.compat.models import build


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
