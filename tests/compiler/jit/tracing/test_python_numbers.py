"""Numbers of the graph mean what Python's numbers mean: among themselves, beside tensors of any type, in functions."""

import operator

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from deepseek.compiler.jit.tracing.python_numbers import Number, as_number

numbers = st.one_of(st.booleans(), st.integers(-50, 50), st.floats(-8, 8).map(lambda number: round(number, 3)))
arithmetic = st.sampled_from(
    [operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod]
)
comparisons = st.sampled_from([operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne])
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool]


def graph_number(value):
    dtype = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(value)]
    return Number(torch.tensor(value, dtype=dtype))


def check_same(got, want):
    assert isinstance(got, Number)
    assert got.tensor.dtype == graph_number(want).tensor.dtype
    assert got.tensor.item() == pytest.approx(want, rel=1e-15, nan_ok=True)


@given(left=numbers, right=numbers, operation=arithmetic)
def test_arithmetic_among_numbers_is_python_s(left, right, operation):
    assume(right != 0 or operation in (operator.add, operator.sub, operator.mul))
    want = operation(left, right)
    check_same(operation(graph_number(left), right), want)
    check_same(operation(left, graph_number(right)), want)
    check_same(operation(graph_number(left), graph_number(right)), want)


@given(left=numbers, right=numbers, operation=comparisons)
def test_comparisons_among_numbers_are_python_s(left, right, operation):
    check_same(operation(graph_number(left), right), operation(left, right))
    check_same(operation(left, graph_number(right)), operation(left, right))


@given(left=st.integers(0, 30), right=st.integers(0, 6))
def test_bits_and_powers_of_whole_numbers_are_python_s(left, right):
    for operation in (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift, operator.pow):
        check_same(operation(graph_number(left), graph_number(right)), operation(left, right))
    check_same(graph_number(left + 1) ** -2, (left + 1) ** -2)


def test_signs_and_bools_are_python_s():
    check_same(-graph_number(True), -1)
    check_same(abs(graph_number(-2.5)), 2.5)
    check_same(~graph_number(5), ~5)
    check_same(graph_number(True) & graph_number(False), False)
    check_same(graph_number(True) + graph_number(True), 2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 2)], ids=str)
@pytest.mark.parametrize("value", [3, 0.1, True], ids=repr)
def test_beside_a_tensor_a_number_is_as_a_number_of_python_is(dtype, shape, value):
    tensor = torch.ones(shape, dtype=dtype)
    for operation in (operator.add, operator.mul, operator.truediv, operator.lt, operator.eq):
        for pair in ((tensor, value), (value, tensor)):
            want = operation(*pair)
            got = operation(*(graph_number(side) if side is value else side for side in pair))
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=1e-6 if dtype != torch.bfloat16 else 0.01, atol=0)


def test_functions_of_torch_take_numbers_as_they_take_python_s():
    x = torch.linspace(-1, 1, 5, dtype=torch.bfloat16)
    for value in (2, 0.25):
        number = graph_number(value)
        for function in (
            lambda value: torch.full((2,), value),
            lambda value: torch.full((2,), value, dtype=torch.float16),
            lambda value: torch.full(size=(2,), fill_value=value),
            lambda value: torch.full_like(x, value),
            lambda value: torch.zeros(3).fill_(value),
            lambda value: torch.where(x > 0, x, value),
            lambda value: x.clamp(max=value),
            lambda value: torch.maximum(x, torch.full_like(x, value)),
        ):
            got, want = function(number), function(value)
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def test_python_takes_the_number_out_where_it_runs():
    assert [10, 20, 30][graph_number(2)] == 30
    assert float(graph_number(0.5)) == 0.5
    assert list(range(graph_number(3))) == [0, 1, 2]
    assert {3: "three"}[graph_number(3)] == "three"
    assert f"{graph_number(7):03d}" == "007"
    assert not graph_number(0)


def test_item_of_a_tensor_is_of_the_widest_type():
    assert as_number(torch.ones(1, dtype=torch.bfloat16)).tensor.dtype == torch.float64
    assert as_number(torch.ones((), dtype=torch.int8)).tensor.dtype == torch.int64
