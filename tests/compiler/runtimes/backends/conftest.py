"""The models that several files of tests run."""

from __future__ import annotations

import pytest
import torch

from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
from deepseek.compiler.runtimes.backends.interface import Job
from tests.compiler.models import small_resnet


@pytest.fixture(scope="module")
def pictures():
    return small_resnet()


@pytest.fixture(scope="module")
def job(pictures):
    """One job for all variants, which share its exports and quantized graphs as in a selection."""
    calibration = [(torch.randn(4, 3, 16, 16),) for _ in range(4)]
    return Job(flatten_model(pictures.model, pictures.samples), calibration=[*calibration, (pictures.samples,)])
