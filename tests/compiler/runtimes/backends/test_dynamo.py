"""Our runtimes as backends of `torch.compile` and `ds.jit`, for inference."""

from __future__ import annotations

import pytest
import torch

import deepseek
from deepseek.compiler.runtimes.backends import dynamo
from tests.compiler.runtimes.backends.offered import HERE


@pytest.mark.parametrize("name", [each for each in ("onnxruntime", "openvino") if each in HERE])
def test_torch_compile_runs_on_our_backends(name, pictures):
    torch._dynamo.reset()
    fast = torch.compile(pictures.model, backend=getattr(dynamo, name), dynamic=False)
    with torch.no_grad():
        answer = fast(pictures.samples)
        assert torch.allclose(answer, pictures.model(pictures.samples), atol=1e-5)
        assert torch.allclose(fast(pictures.samples * 2), pictures.model(pictures.samples * 2), atol=1e-5)


@pytest.mark.parametrize("name", [each for each in ("onnxruntime", "openvino") if each in HERE])
def test_jit_knows_our_backends_by_name(name, pictures):
    fast = deepseek.jit(pictures.model, backend=name, dynamic=False)
    with torch.no_grad():
        for samples in (pictures.samples, pictures.samples * 2):
            assert torch.allclose(fast(samples), pictures.model(samples), atol=1e-5)
    assert dynamo.find_compiler("inductor") == "inductor"


def test_gradients_are_refused_where_there_are_none(pictures):
    torch._dynamo.reset()
    fast = torch.compile(pictures.model, backend=dynamo.onnxruntime, dynamic=False)
    with pytest.raises(Exception, match="no gradients"):
        fast(pictures.samples)
