"""What two sides give, merged into one form; and results, which leave a graph with tensors in place of its numbers."""

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from deepseek.compiler.jit.decorator import jit
from deepseek.compiler.jit.tracing.merging import (
    Constant,
    Container,
    Leaf,
    describe,
    flatten,
    has_leaves,
    leaves_of,
    publish,
    rebuild,
)
from deepseek.compiler.jit.tracing.python_numbers import Number
from deepseek.compiler.jit.tracing.sites import ControlFlowError


@dataclasses.dataclass
class Counted:
    values: torch.Tensor
    count: int


class Pair(NamedTuple):
    values: torch.Tensor
    count: int


def number(value):
    return Number(torch.tensor(value))


def test_a_result_leaves_as_tensors():
    value = [number(1), {"a": (number(0.5), "text")}]
    got = publish(value)
    assert isinstance(got[0], torch.Tensor)
    assert got[1]["a"][0].item() == 0.5
    assert got[1]["a"][1] == "text"
    untouched = {"a": [1, "b"]}
    assert publish(untouched) is untouched


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(z=number(3), a="text"),
        Counted(torch.ones(2), number(3)),
        Pair(torch.ones(2), number(3)),
        {"inside": Counted(torch.ones(2), number(3))},
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_number_leaves_every_kind_of_container_as_a_tensor_and_the_container_keeps_its_class(value):
    got = publish(value)
    assert type(got) is type(value)
    inside = got["inside"] if type(got) is dict else got
    found = inside["z"] if isinstance(inside, dict) else inside.count
    assert type(found) is torch.Tensor
    assert found.item() == 3


FORM = Container(
    dict,
    ["number", "same", "rows"],
    [
        Leaf(torch.int64, (), torch.device("cpu"), True, True),
        Constant("text"),
        Container(list, None, [Leaf(torch.float64, (2,), torch.device("cpu"), True, False)]),
    ],
)


def test_a_value_comes_back_from_its_tensors_and_none_of_them_is_the_one_that_went_in():
    rows = torch.ones(2, dtype=torch.float32)
    leaves = flatten(FORM, {"number": 3, "same": "text", "rows": [rows]})
    assert [leaf.dtype for leaf in leaves] == [torch.int64, torch.float64]
    assert leaves[1].data_ptr() != rows.data_ptr()
    back = rebuild(FORM, leaves)
    assert back["same"] == "text"
    assert back["number"].tensor.item() == 3
    assert torch.equal(back["rows"][0], torch.ones(2, dtype=torch.float64))


def test_the_tensors_of_a_form():
    assert len(leaves_of(FORM)) == 2
    assert has_leaves(FORM)
    assert not has_leaves(Container(list, None, [Constant(1)]))


def test_values_in_a_few_words():
    assert describe(torch.zeros(2, 3)) == "a tensor of shape [2, 3] and torch.float32"
    assert describe([1, 2]) == "a list of 2"
    assert describe(None) == "None"


def counted(x):
    return Counted(x * 2, 1) if x.sum() > 0 else Counted(x * 3, 2)


def paired(x):
    if x.sum() > 0:
        return Pair(x * 2, 1)
    return Pair(x * 3, 2)


def ordered(x):
    found, count = collections.OrderedDict(z=x), 0
    while x.sum() > count:
        count += 1
    found["count"] = count
    return found


def model_output(x):
    states = ()
    for _ in range(2):
        states = (*states, x)
        if x.sum() > 0:
            x = x * 2
    return BaseModelOutput(last_hidden_state=x, hidden_states=states)


def equal_sets(x):
    seen = {1}
    if x.sum() > 0:
        seen.add(2)
    else:
        seen.add(2)
    return x * len(seen)


@pytest.mark.parametrize("function", [counted, paired, ordered, model_output, equal_sets])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_results_have_python_s_classes_keys_and_values(function, sign):
    x = torch.tensor([0.5, 1.0], dtype=torch.float64) * sign
    want, got = function(x), jit(function, backend="eager")(x)
    assert type(got) is type(want)
    for found, expected in zip(leaves(got), leaves(want), strict=True):
        assert type(found) is torch.Tensor
        assert torch.equal(found.double(), torch.as_tensor(expected, dtype=torch.float64))


def leaves(value):
    if isinstance(value, (torch.Tensor, int, float)):
        return [value]
    children = vars(value).values() if dataclasses.is_dataclass(value) and not isinstance(value, dict) else value
    children = value.values() if isinstance(value, dict) else children
    return [leaf for child in children for leaf in leaves(child)]


def test_sets_that_differ_are_refused_with_the_line():
    def function(x):
        seen = {1}
        if x.sum() > 0:
            seen.add(2)
        return x * len(seen)

    with pytest.raises(ControlFlowError, match=r"test_merging\.py:\d+: seen is a set"):
        jit(function, backend="eager")(torch.ones(2))
