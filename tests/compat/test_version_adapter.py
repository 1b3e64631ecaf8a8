"""Old call sites reach the right entry point and hear what to write instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek.compat.version_adapter import VersionAdapter
from deepseek.core.errors import ConfigError


class Model(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale

    def flash_attn(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return -x * scale


X = torch.arange(3.0)


@pytest.mark.parametrize("version", ["v1.0", "1.3", "v2.0", "2.3", "v3.0", "3.1", "v4.2"])
def test_older_generations_call_the_model_with_a_deprecation_warning(version: str) -> None:
    with pytest.warns(DeprecationWarning, match=r"call model\(x\)"):
        assert torch.equal(VersionAdapter(Model(), version).forward(X, scale=2.0), 2 * X)


def test_the_current_generation_calls_the_model_in_silence() -> None:
    assert torch.equal(VersionAdapter(Model(), "v5.0")(X), X)


def test_3_5_runs_the_fused_attention() -> None:
    with pytest.warns(DeprecationWarning, match=r"model\.flash_attn\(x\) is the convention of generation 3\.5"):
        assert torch.equal(VersionAdapter(Model(), "v3.5").forward(X), -X)


def test_3_5_without_fused_attention_calls_the_model_and_says_so() -> None:
    adapter = VersionAdapter(nn.Identity(), "v3.5")
    assert adapter.flash_attn is None
    with pytest.warns(UserWarning, match="Identity has no flash_attn"):
        assert torch.equal(adapter.forward(X), X)


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(DeprecationWarning) as warned:
        VersionAdapter(Model(), "2.0").forward(X)
    assert warned[0].filename == __file__


def test_an_unknown_version_raises() -> None:
    with pytest.raises(ConfigError, match="unknown generation 'v9'"):
        VersionAdapter(Model(), "v9")


def test_a_planned_version_raises() -> None:
    with pytest.raises(ConfigError, match=r"6\.0 is planned"):
        VersionAdapter(Model(), "v6.0")


def test_a_model_that_cannot_be_called_raises() -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        VersionAdapter({"weights": X}, "v2.0")
