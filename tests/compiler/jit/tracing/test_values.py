"""Numbers out of tensors, indices that are not known yet, changes of what a variable holds."""

import collections

import pytest
import torch

from deepseek.compiler.jit.decorator import ControlFlowError, jit
from deepseek.compiler.jit.tracing.values import copy_container


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(function, *inputs):
    """Compile once, and compare values and types with plain Python for every input."""
    compiled = jit(function, backend="eager")
    with torch.no_grad():
        for x in inputs:
            got, want = compiled(x.clone()), function(x.clone())
            torch.testing.assert_close(got, want)


def test_numbers_taken_out_of_tensors_do_not_widen_what_they_multiply():
    def function(x):
        scale = float(x.max()) + x.min().item()
        count = int(x.sum())
        return x * scale, x.sum() * scale, torch.full((2,), count), torch.tensor(scale)

    for dtype in (torch.float32, torch.bfloat16):
        check(function, torch.tensor([0.5, 2.0], dtype=dtype), torch.tensor([1.5, 4.0], dtype=dtype))


def test_min_and_max_of_a_counter():
    def function(x):
        count = 0
        while count < x.sum():
            count = min(count + 3, 7)
            x = x * 0.9
        return x * max(count, 2) * max(count, 2.5)

    check(function, torch.ones(4), torch.ones(9), -torch.ones(2))


def test_an_index_may_be_a_number_of_the_graph():
    def function(x):
        table = torch.zeros(4, 2)
        row = 0
        while row < x.sum():
            table[row, 1] = x[row] * 2
            table[row] += 1
            row += 1
        return table, x[row - 1]

    check(function, torch.ones(3), torch.tensor([0.5, 0.5, 0.0]))


def test_a_write_outside_of_conditions_is_seen_by_views():
    def function(x):
        table = torch.zeros(3)
        view = table.view(1, 3)
        table[x.argmax()] = 7.0
        table += 1
        return view + 0

    check(function, torch.tensor([1.0, 3.0, 2.0]), torch.tensor([5.0, 3.0, 2.0]))


def test_an_argument_is_not_written_in_a_branch():
    def function(x):
        if x.sum() > 0:
            x[0] = 5.0
        return x

    with pytest.raises(ControlFlowError, match="changes something outside"):
        jit(function, backend="eager")(torch.ones(2))


@pytest.mark.parametrize(
    "value", [[1, 2], {"a": 1}, {1, 2}, collections.OrderedDict(a=1), collections.deque([1, 2], maxlen=2)], ids=repr
)
def test_a_copied_container_is_another_of_the_same_class(value):
    copied = copy_container(value)
    assert copied == value
    assert copied is not value
    assert type(copied) is type(value)
