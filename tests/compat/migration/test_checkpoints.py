"""Checkpoints are judged by their headers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.compat.migration.checks import (
    found,
    save_old_llama,
)
from tests.compat.models import build


def test_checkpoints_are_judged_by_their_headers(tmp_path: Path) -> None:
    weights = save_old_llama(tmp_path / "old")
    save_file({name: each.clone() for name, each in build("bert").state_dict().items()}, tmp_path / "good.safetensors")
    half = {name: each for name, each in weights.items() if "gate_up" not in name}
    half |= {f"model.layers.{n}.mlp.{p}_proj.weight": torch.ones(2, 2) for n in range(2) for p in ("gate", "up")}
    save_file(half, tmp_path / "half.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-5])
    rules = {each.path: each.rule for each in found(tmp_path)}
    assert rules == {
        "old/model.safetensors": "checkpoint-layout",
        "half.safetensors": "checkpoint-half-converted",
        "cut.safetensors": "unreadable",
    }


def test_a_family_that_is_fused_by_nature_is_not_judged(tmp_path: Path) -> None:
    phi3 = build("phi3")
    save_file({name: each.clone() for name, each in phi3.state_dict().items()}, tmp_path / "model.safetensors")
    assert [each.rule for each in found(tmp_path)] == ["checkpoint-layout"]
    phi3.config.save_pretrained(tmp_path)
    assert found(tmp_path) == []


def test_fused_names_without_a_config_are_left_to_a_person(tmp_path: Path) -> None:
    phi3 = build("phi3")
    save_file({name: tensor.clone() for name, tensor in phi3.state_dict().items()}, tmp_path / "model.safetensors")
    (finding,) = found(tmp_path)
    assert not finding.is_fixable
    assert "put its config.json beside it" in finding.why


def test_gate_and_up_fused_alone_are_a_family_of_its_own(tmp_path: Path) -> None:
    names = [f"layers.0.self_attn.{part}_proj.weight" for part in "qkvo"] + ["layers.0.mlp.gate_up_proj.weight"]
    save_file({name: torch.ones(8, 8) for name in names}, tmp_path / "model.safetensors")
    assert found(tmp_path) == []
