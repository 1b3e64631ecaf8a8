"""Operations are chained in order, and two that claim one tensor are refused."""

from __future__ import annotations

import pytest
import torch

from deepseek.compat.conversion_steps import FUSE_LLAMA, DirectedTransform, Step
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ArtifactError
from tests.compat.conversions import llama_attention


def test_a_tensor_that_two_steps_claim_names_both() -> None:
    greedy = Step("2.0", "3.5", (DirectedTransform(FUSE_LLAMA, "forward"), DirectedTransform(FUSE_LLAMA, "forward")))
    with pytest.raises(ArtifactError, match="claimed by two steps"):
        VersionConverter("2.0", "3.5", steps=(greedy,)).convert(llama_attention())


def test_names_that_collide_are_refused() -> None:
    both = {"encoder.LayerNorm.gamma": torch.ones(2), "encoder.LayerNorm.weight": torch.ones(2)}
    with pytest.raises(ArtifactError, match="half converted"):
        VersionConverter("1.0", "1.3").convert(both)
