import json
import math
from collections import OrderedDict, namedtuple

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.checkpoint.structure import flatten, unflatten
from deepseek.core.errors import CheckpointError

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=20,
)


def through_json(state):
    structure, tensors = flatten(state)
    return unflatten(json.loads(json.dumps(structure, allow_nan=False)), tensors)


def is_same(left, right):
    """Equal in type, order and bits; all NaN are one."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or left.hex() == right.hex()
    if isinstance(left, dict):
        return is_same(list(left.items()), list(right.items()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(is_same(*pair) for pair in zip(left, right, strict=True))
    return left == right


@given(st.dictionaries(st.text() | st.integers(), values, max_size=4))
def test_any_nested_state_comes_back_with_its_types_and_bits(state):
    assert is_same(through_json(state), state)


def test_keys_that_look_like_tags_are_still_keys():
    state = {"tensor": "a", "dict": [1], "nested": {"float": "inf"}}
    assert through_json(state) == state


def test_int_and_str_keys_with_one_spelling_stay_apart():
    state = {0: torch.zeros(1), "0": torch.ones(1), "a": {"b": torch.full((1,), 2.0)}, "a.b": torch.full((1,), 3.0)}
    back = through_json(state)
    assert [back[0], back["0"], back["a"]["b"], back["a.b"]] == [0, 1, 2, 3]
    assert [type(key) for key in back] == [int, str, str, str]


def test_tied_tensors_are_stored_once_and_come_back_tied():
    weight = torch.randn(3, 3)
    structure, tensors = flatten({"embed": weight, "head": weight, "transposed": weight.t()})
    assert len(tensors) == 2
    back = unflatten(structure, tensors)
    assert back["embed"] is back["head"]


def test_wide_complex_numbers_survive():
    value = torch.randn(3, dtype=torch.complex128)
    back = through_json({"value": value, "conjugate": value.conj(), "empty": value[:0]})
    assert torch.equal(back["value"], value)
    assert torch.equal(back["conjugate"], value.conj().resolve_conj())
    assert back["empty"].shape == (0,)


def test_ordered_dicts_and_sizes_come_back_plain():
    state = OrderedDict(b=torch.Size([2, 3]), a=1)
    assert through_json(state) == {"b": (2, 3), "a": 1}


@pytest.mark.parametrize(
    "value", [numpy.float64(1), numpy.zeros(1), {1}, b"x", object(), namedtuple("Pair", "a b")(1, 2), torch.float32]
)
def test_a_value_that_would_change_its_type_is_refused_by_place(value):
    with pytest.raises(CheckpointError, match=r"state\['optimizer'\]\[0\] is a "):
        flatten({"optimizer": [value]})


@pytest.mark.parametrize("key", [1.5, None, True, (1, 2)])
def test_other_keys_are_refused(key):
    with pytest.raises(CheckpointError, match="use str or int keys"):
        flatten({"a": {key: 1}})
