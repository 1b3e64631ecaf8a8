"""`deepseek migrate`: what it prints, its exit status, and the arguments it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek.cli.verbs.migrate import migrate as run
from deepseek.cli.verbs.train import choose_config
from deepseek.core.errors import ConfigError
from tests.cli.commands import as_options


def test_the_command_says_place_rule_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text("import numpy as np\nx = np.float\n")
    assert run(check=tmp_path, target="v5.0") == 1
    assert "a.py:2:5: error python-numpy-float: the alias of the built-in type is gone" in capsys.readouterr().out
    assert run(check=tmp_path, json=True) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["line"], finding["column"], finding["is_fixable"]) == (2, 5, True)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert run(tmp_path) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one path"),
        ({"path": Path("missing")}, "missing does not exist"),
        ({"path": Path(), "apply": True}, "give both or none"),
        ({"path": Path(), "apply": True, "out": Path("inside")}, "lies inside"),
        ({"path": Path(), "apply": True, "out": Path("/tmp")}, "exists"),
        ({"path": Path(), "target": "v9"}, "unknown generation 'v9'"),
        ({"path": Path(), "target": "v2.0", "source": "v3.0"}, "a migration goes up"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**arguments)


PROGRAM = """
import json
import numpy as np
import torch
import yaml
from safetensors.torch import load_file

settings = yaml.safe_load(open("conf/run.yaml"))
clip = settings["gradient_clip"]
steps = settings.get("gradient_accumulation", 1)
weights = load_file(settings["checkpoint"])
notes = torch.load("runs/epoch3/notes.pt")
np.testing.assert_allclose(np.zeros(1, dtype=np.float), 0)
total = sum(float(tensor.sum()) for tensor in weights.values())
print(json.dumps([clip, steps, sorted(notes), round(total, 4)]))
"""
CONFIG = """generation: v2.0
fp16: false
gradient_clip: 0.5
gradient_accumulation: 2
"""


def test_a_migrated_project_runs_with_keys_read_in_code_and_nested_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    (old / "conf").mkdir(parents=True)
    (old / "runs" / "epoch3").mkdir(parents=True)
    (old / "run.py").write_text(PROGRAM)
    (old / "conf" / "run.yaml").write_text(CONFIG + "checkpoint: runs/epoch3/model.safetensors\n")
    (old / "conf" / "train.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    weights = {f"h.0.attn.{part}_proj.weight": torch.randn(8, 8) for part in "qkvc"}
    save_file(weights | {"ln_f.weight": torch.ones(8)}, old / "runs" / "epoch3" / "model.safetensors")
    torch.save({"loss": torch.ones(2)}, old / "runs" / "epoch3" / "notes.pt")
    assert run(old, source="v2.0", apply=True, out=tmp_path / "new") == 1
    shown = capsys.readouterr().out
    assert re.search(r"changed runs/epoch3/model.safetensors: converted from 2.\d to 5.0", shown)
    assert "reads it by this name, so change both together" in shown
    new = load_file(tmp_path / "new" / "runs" / "epoch3" / "model.safetensors")
    assert set(new) == {"h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "ln_f.weight"}
    # The old program runs where its libraries still have what it calls: numpy.float is all that they lack.
    before = PROGRAM.replace("np.float", "float")
    (old / "run.py").write_text(before)
    command = [sys.executable, "run.py"]
    outputs = [
        subprocess.run(command, cwd=tmp_path / name, capture_output=True, text=True, check=True).stdout
        for name in ("old", "new")
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[1])[:3] == [0.5, 2, ["loss"]]
    for name in ("old", "new"):
        monkeypatch.chdir(tmp_path / name)
        config = choose_config(None, Path("conf/train.yaml"))
        assert (config.ds_amp_level, config.optimizer.grad_clip, config.accum_steps) == ("O0", 0.5, 2)
    assert "conf/train.yaml is read as generation 5.0" in capsys.readouterr().err


def test_a_run_is_trained_from_a_migrated_config(
    tmp_path: Path, tiny: dict[str, Any], call: Callable[..., Any]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(CONFIG)
    assert run(tmp_path / "old", apply=True, out=tmp_path / "new") == 0
    options = as_options(tiny | {"folder": str(tmp_path / "run"), "num_steps": 2, "evaluation_units": 32})
    result = call("train", "--config", tmp_path / "new" / "config.yaml", *options, "--json")
    assert (result.status, result.kinds[-1]) == (0, "model_saved")
    assert "ds_grad_clip=0.5 is optimizer.grad_clip=0.5" in result.err


def _save_pickles(folder: Path) -> None:
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, folder / "plain.pt")
    torch.save({"w": torch.ones(2)}, folder / "named.pt")
    torch.save({"w": torch.ones(2)}, folder / "twice.pt")
    save_file({"w": torch.ones(2)}, folder / "twice.safetensors")
    torch.save({"w": torch.ones(2), "epoch": 3}, folder / "state.pt")
    (folder / "run.py").write_text("PATH = 'named.pt'\n")


def test_the_last_line_counts_what_is_settled_and_what_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save_pickles(tmp_path / "old")
    (tmp_path / "old" / "a.py").write_text("import numpy as np\nx = np.float\n")
    assert run(tmp_path / "old") == 1
    checked = capsys.readouterr().out
    last = "5 findings, 1 of them settled by --apply --out DIR, and 2 pickles if nothing but tensors is in there"
    assert checked.splitlines()[-1] == last
    assert "(run.py:1 names it)" in checked
    assert run(tmp_path / "old", apply=True, out=tmp_path / "new") == 1
    left = capsys.readouterr().out.splitlines()
    assert left[-1] == "2 files changed, 3 findings left"
    (state,) = (line for line in left if line.startswith("state.pt"))
    assert "it holds more than plain tensors by their names" in state
    assert not any("--apply" in line for line in left)
    assert run(tmp_path / "new", exclude=["*.pt"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 findings"


def test_rules_that_the_source_has_behind_it_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text("import torch\ntorch.symeig(a)\n")
    assert run(tmp_path, source="v2.0") == 0
    note = capsys.readouterr().out.splitlines()[0]
    assert note == (
        "not looked for, since --from v2.0 has it behind it: "
        "python-clip-grad-norm, python-assert-allclose, python-symeig"
    )
    assert run(tmp_path) == 1
