"""TVM answers like eager, and says what tuning costs."""

from __future__ import annotations

import warnings

import pytest
import torch

from deepseek.compiler.runtimes.backends import BACKENDS, BackendError, dynamo
from tests.compiler.models import small_mlp


def test_tvm_answers_like_eager_and_says_what_tuning_costs():
    if not BACKENDS["tvm"].is_available():
        pytest.skip("apache-tvm is not installed")
    mlp = small_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        compiled = BACKENDS["tvm"].compile(mlp.model, mlp.samples)
        assert torch.allclose(compiled(mlp.samples), mlp.model(mlp.samples), atol=1e-5)
        with pytest.raises(BackendError, match=r"takes about \d+ minutes"):
            BACKENDS["tvm"].compile(mlp.model, mlp.samples, variant="tuned")
        torch._dynamo.reset()
        fast = torch.compile(mlp.model, backend=dynamo.tvm, dynamic=False)
        with torch.no_grad():
            assert torch.allclose(fast(mlp.samples), mlp.model(mlp.samples), atol=1e-5)
