"""What every backend is: failures as sentences, made once, and a log as loud as before."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes.backends import BACKENDS, BackendError
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
from deepseek.compiler.runtimes.backends.interface import Built, Job, Variant, build, quiet
from tests.compiler.models import small_mlp


def test_the_log_is_as_loud_as_before():
    before = logging.root.manager.disable
    with quiet():
        assert logging.root.manager.disable >= logging.WARNING
    assert logging.root.manager.disable == before


def test_a_model_that_is_no_graph_says_so():
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(BackendError, match="not one graph"):
        BACKENDS["openvino"].compile(Branching().eval(), torch.ones(2))


def test_a_runtime_that_fails_is_one_sentence():
    def fail(job):
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(BackendError, match=r"^odd in fp32: RuntimeError: first line$"):
        build(Variant("odd", "fp32", "", fail), Job(flatten_model(nn.Linear(2, 2).eval(), torch.ones(1, 2))))


def test_what_failed_once_is_not_tried_again():
    calls = []

    def make():
        calls.append(1)
        raise BackendError("no")

    job = Job(flatten_model(nn.Linear(2, 2).eval(), torch.ones(1, 2)))
    for _ in range(2):
        with pytest.raises(BackendError, match="no"):
            job.once("key", make)
    assert calls == [1]


def test_notes_and_findings_are_part_of_the_description():
    compiled = BACKENDS["eager"].compile(small_mlp().model, small_mlp().samples, "int8")
    assert compiled.describe()["notes"] == ["2 linear layers in int8"]
    assert Built(lambda: ()).findings == ()


def odd_views():
    """Tensors of shape (3, 6) as callers have them: each lies in memory in a way of its own."""
    rows = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    return {
        "rows of a larger tensor": rows[1:4],
        "transposed": rows[:6, :3].contiguous().t(),
        "every second column": torch.randn(3, 12)[:, ::2],
        "expanded": rows[:1].expand(3, 6),
        "of an array": torch.from_numpy(np.arange(19, dtype="f4"))[1:].view(3, 6),
        "a parameter": nn.Parameter(rows[:3].clone()),
    }


@pytest.mark.parametrize("name", ["eager", "inductor", "onnxruntime", "openvino", "tvm"])
def test_inputs_may_lie_in_memory_as_they_like(name):
    if not BACKENDS[name].is_available():
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of a runtime's own imports
        for sample in (torch.randn(3, 6), torch.randn(1, 6).expand(3, 6)):
            compiled = BACKENDS[name].compile(model, sample)
            for kind, view in odd_views().items():
                torch.testing.assert_close(compiled(view), model(view), rtol=1e-4, atol=1e-5, msg=kind)
