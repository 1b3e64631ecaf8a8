"""The truth of values: Python's rules where they are known, boolean tensors where they are not."""

import pytest
import torch

from deepseek.compiler.jit.decorator import ControlFlowError, jit
from deepseek.compiler.jit.rewriting.counterparts import ENTRY
from deepseek.compiler.jit.tracing.conditions import MAX_DEPTH
from deepseek.compiler.jit.tracing.sites import Site

SITE = Site(__file__, 1, "a condition")


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_known_values_are_joined_as_python_joins_them():
    def unreachable():
        raise AssertionError("the right side is not needed")

    assert ENTRY.and_(0, unreachable, SITE) == 0
    assert ENTRY.or_("x", unreachable, SITE) == "x"
    assert ENTRY.not_([], SITE) is True
    assert ENTRY.compare(("Lt", "Lt"), 3, (lambda: 1, unreachable), SITE) is False
    assert ENTRY.compare(("Lt", "LtE"), 1, (lambda: 2, lambda: 2), SITE)


def test_conditions_on_tensors_join_with_those_of_python():
    def function(x, flag):
        if flag and (not x.sum() > 3 or x.min() > 1) and 0 < x.max() <= 5 != 7:
            return x * 2
        return x

    compiled = jit(function, backend="eager")
    with torch.no_grad():
        for flag in (True, False):
            for x in (torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 9.0)):
                assert torch.equal(compiled(x, flag), function(x, flag))


def test_the_operators_go_as_deep_as_there_are_letters():
    deepest, depth = ENTRY.inner, 0
    while deepest.building is not None:
        deepest, depth = deepest.building, depth + 1
    assert depth == MAX_DEPTH
    with pytest.raises(ControlFlowError, match=f"nested {MAX_DEPTH} deep; split the function"):
        deepest.deeper(SITE, is_probing=False)
