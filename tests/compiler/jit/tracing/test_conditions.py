"""The truth of values: Python's rules where they are known, boolean tensors where they are not."""

from contextlib import nullcontext

import pytest
import torch

from deepseek.compiler.jit.decorator import ControlFlowError, GraphBreakWarning, jit
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


def is_true(x):
    positive = bool(x.sum() > 0)
    return x if positive is True else x * 2


def is_not_true_after_a_loop(x):
    found = False
    for value in x:
        if value > 2:
            found = True
    if found is not True:
        return x * 3
    return x


def item_is_false(x):
    return x * 5 if (x.sum() > 0).item() is False else x


def a_tensor_is_never_true(x):
    return x if (x.sum() > 0) is True else x * 2


def type_is_int(x):
    return x if type(int(x.argmax())) is int else x * 2


def types_of_counters_and_sums(x):
    count, total = 0, 0.0
    while x.sum() > count:
        count, total = count + 1, total + 1.5
    return x * 2 if (type(count), type(total), type(x)) == (int, float, torch.Tensor) else x * 3


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        is_true,
        is_not_true_after_a_loop,
        item_is_false,
        a_tensor_is_never_true,
        type_is_int,
        types_of_counters_and_sums,
    ],
    ids=lambda function: function.__name__,
)
def test_what_a_number_of_the_graph_is_decides_as_in_python(function, fullgraph):
    compiled = jit(function, backend="eager", fullgraph=fullgraph)
    for x in (torch.tensor([1.5, -2.0, 3.0]), torch.tensor([-1.5, 2.0, -3.0])):
        torch.testing.assert_close(compiled(x), function(x))


def test_a_match_on_numbers_of_the_graph_is_refused_or_python():
    def choose(x):
        match (bool(x[0] > 0), bool(x[1] > 0)):
            case (True, False):
                return x
            case (False, True):
                return x * 3
        return x * 9

    inputs = [torch.tensor([a, b]) for a in (1.0, -1.0) for b in (1.0, -1.0)]
    with pytest.raises(ControlFlowError, match=r"test_conditions.py:\d+: a match on a number .* if and elif"):
        jit(choose, backend="eager")(inputs[0])
    torch._dynamo.reset()
    compiled = jit(choose, backend="eager", fullgraph=False)
    for x in inputs:
        with pytest.warns(GraphBreakWarning) if x is inputs[0] else nullcontext():
            torch.testing.assert_close(compiled(x), choose(x))


def test_a_match_on_what_python_knows_stays_python():
    @jit(backend="eager")
    def scale(x, mode):
        match mode:
            case "double":
                return x * 2
            case {"by": factor}:
                return x * factor
            case _:
                return x

    x = torch.ones(2)
    assert [scale(x, mode)[0].item() for mode in ("double", {"by": 5}, None)] == [2.0, 5.0, 1.0]
