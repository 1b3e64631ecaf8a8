"""Fusing is for inference: no test here records gradients."""

import pytest
import torch


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        torch.manual_seed(0)
        yield
