"""Numbers out of tensors, indices that are not known yet, changes of what a variable holds."""

import collections

import pytest
import torch
from torch.utils import _pytree as pytree

from deepseek.compiler.jit.decorator import ControlFlowError, GraphBreakWarning, jit
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


# ---- writes into what stands inside of containers


def add_to_an_item(x):
    items = {"k": x * 1}
    alias = items["k"]
    items["k"] += 1  # in place, outside of any condition
    return items["k"], alias


def add_to_an_item_in_a_branch(x):
    items = [x * 1, x * 2]
    if x.sum() > 0:
        items[0] += 1
        items[-1] *= 2
    return items


def write_two_levels_deep(x):
    items = {"a": {"b": x * 1}, "c": [x]}
    if x.sum() > 0:
        items["a"]["b"] = x * 2
        items["c"].append(x)
    else:
        items["a"]["b"] = x * 3
        items["c"].append(x * 2)
    items["a"]["z"] = x
    return items


def write_a_row_s_element(x):
    table = torch.zeros(2, 3, dtype=x.dtype)
    if x.sum() > 0:
        table[0][1] = x.sum()
    table[1][2] += x[0]
    table[:, :2] += 1
    return table


def count_in_a_dict(x):
    found = {"count": 0, "sum": 0.0}
    while x.sum() > found["count"]:
        found["count"] += 1
        found["sum"] += found["count"] / 2
    return x * found["count"], found["sum"]


def index_once(x):
    places, items = iter([0, 1]), [x * 1, x * 2]
    items[next(places)] += 1
    return items, next(places)


@pytest.mark.parametrize(
    "function",
    [
        add_to_an_item,
        add_to_an_item_in_a_branch,
        write_two_levels_deep,
        write_a_row_s_element,
        count_in_a_dict,
        index_once,
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_write_inside_of_a_container_is_python_s(function, sign):
    x = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) * sign
    got, want = (pytree.tree_flatten(made(x.clone())) for made in (jit(function, backend="eager"), function))
    assert got[1] == want[1]
    for found, expected in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(expected).double())


def test_an_item_that_another_variable_holds_is_not_written_in_a_branch():
    def function(x):
        items = [x * 1]
        alias = items[0]
        if x.sum() > 0:
            items[0] += 1
        return alias

    with pytest.raises(ControlFlowError, match=r"test_values\.py:\d+.*alias holds it beside items"):
        jit(function, backend="eager")(torch.ones(2))


def first(x):
    count = 0
    while x.sum() > count:
        count += 1
    return x[:count].sum()


def column(x):
    count = 0
    while x.sum() > count:
        count += 1
    return torch.stack([x, x])[:, :count].sum()


@pytest.mark.parametrize("function", [first, column])
def test_a_slice_up_to_a_counter_is_refused_with_its_line_or_breaks_the_graph(function):
    x = torch.tensor([0.5, 1.0, 0.25])
    with pytest.raises(ControlFlowError, match=r"test_values\.py:\d+: a slice ends at a number.*choose with a mask"):
        jit(function, backend="eager")(x)
    with pytest.warns(GraphBreakWarning, match="a slice ends at a number"):
        assert torch.equal(jit(function, backend="eager", fullgraph=False)(x), function(x))
