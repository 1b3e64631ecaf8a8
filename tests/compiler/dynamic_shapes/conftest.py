"""Each test begins with a compiler that has compiled nothing."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
