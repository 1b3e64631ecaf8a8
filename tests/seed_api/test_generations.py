"""The rows "Generations, migration, tools" of the specification, as a user writes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import deepseek
import deepseek as ds
from deepseek.cli.verbs.advise import advise
from deepseek.cli.verbs.check_compatibility import check_compatibility
from deepseek.cli.verbs.migrate import migrate


def test_version_info_is_a_true_dict() -> None:
    info = deepseek.get_version_info()
    assert {"version", "cuda_version", "recommended_gpu", "new_features"} <= set(info)
    assert info["cuda_version"] == (torch.version.cuda if torch.cuda.is_available() else None)


def test_adapter_runs_old_call_sites_and_refuses_unknown_versions() -> None:
    from deepseek import VersionAdapter

    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    with pytest.warns(DeprecationWarning, match=r"call model\(x\)"):
        assert torch.equal(VersionAdapter(model, "v2.0").forward(x), model(x))
    with pytest.raises(ValueError, match="unknown generation"):
        VersionAdapter(model, "v0.1").forward(x)


def test_converter_takes_weights_from_one_generation_to_another() -> None:
    from deepseek import VersionConverter

    weights = {f"layers.0.self_attn.{each}_proj.weight": torch.randn(4, 4) for each in "qkvo"}
    converted = VersionConverter(src_version="v2.0", dst_version="v3.5").convert(weights)
    parts = converted["layers.0.self_attn.qkv_proj.weight"].split(4)
    assert all(
        torch.equal(part, weights[f"layers.0.self_attn.{each}_proj.weight"])
        for part, each in zip(parts, "qkv", strict=True)
    )
    assert len(converted.report.merged) == 1


def test_profile_gives_the_options_of_a_generation() -> None:
    options = ds.profile("v2.3")
    assert (options.quantization, options.batching) == ("int8", "dynamic")


def test_migrate_checks_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("gradient_clip: 1.0\n")
    assert migrate(check=tmp_path) == 1
    assert "config.yaml:1:1" in capsys.readouterr().out


def test_advise_and_check_compatibility_answer(capsys: pytest.CaptureFixture[str]) -> None:
    advise(params="7e9", gpu_memory="24GB", latency="batch", scale="single")
    assert "Generation 2.3" in capsys.readouterr().out
    check_compatibility()
    assert sys.version.split()[0] in capsys.readouterr().out
