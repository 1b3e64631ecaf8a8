"""Choices between two parts: Python's where the condition is known, a graph's where it is not."""

import dataclasses

import pytest
import torch

from deepseek.compiler.jit.decorator import ControlFlowError, jit
from deepseek.compiler.jit.rewriting.counterparts import ENTRY
from deepseek.compiler.jit.tracing.sites import Site

SITE = Site(__file__, 1, "if", names=("y",))


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_known_condition_runs_one_branch():
    def unreachable(*_):
        raise AssertionError("this branch is not taken")

    assert ENTRY.cond(True, lambda operators, y: (y + 1,), unreachable, (1,), SITE) == (2,)
    assert ENTRY.cond(torch.tensor(0.0), unreachable, lambda operators, y: (y - 1,), (1,), SITE) == (0,)


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor | None = None


def test_a_dataclass_comes_back_as_one():
    def function(x):
        if x.sum() > 0:
            return Output(x.sum(), None)
        return Output(x.mean(), None)

    compiled = jit(function, backend="eager")
    with torch.no_grad():
        for x in (torch.ones(2), -torch.ones(2)):
            got, want = compiled(x), function(x)
            assert type(got) is Output
            assert got.loss == want.loss
            assert got.logits is None


def test_keys_in_another_order_are_refused():
    def function(x):
        if x.sum() > 0:
            return {"a": x, "b": x}
        return {"b": x, "a": x}

    with pytest.raises(ControlFlowError, match="the same keys in one order"):
        jit(function, backend="eager")(torch.ones(2))
