"""Indices that are not known yet pick what torch picks by known ones."""

import itertools

import pytest
import torch

from deepseek.compiler.jit.decorator import jit
from deepseek.compiler.jit.tracing.indexing import as_indices, is_index, is_plain_index

ALL = slice(None)


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_one_whole_number_is_what_python_takes_for_an_index(dtype, shape):
    value = torch.ones(shape, dtype=dtype)
    is_whole = dtype in (torch.uint8, torch.int32, torch.int64)
    assert is_index(value) is (is_whole and shape == ())


@pytest.mark.parametrize("index", list(itertools.product([torch.tensor(1), 1, -1, ALL], repeat=2)), ids=str)
def test_as_indices_pick_what_brackets_pick(index):
    value = torch.arange(24.0).reshape(2, 3, 4)
    picked = torch.ops.aten.index.Tensor(value, as_indices(value, index)) if index != (ALL, ALL) else value
    assert torch.equal(picked, value[index])


@pytest.mark.parametrize(
    ("index", "is_plain"),
    [
        ((torch.tensor(1), 0), True),
        ((torch.tensor(1), ALL), True),
        ((1, ALL), False),  # nothing in it is unknown
        ((torch.tensor(1), slice(1, None)), False),
        ((torch.tensor(1), slice(None, None, 2)), False),
        ((torch.tensor(1), True), False),
        ((torch.tensor(1), None), False),
        ((torch.tensor(1), ...), False),
        ((torch.tensor([0, 1]), 0), False),
        ((torch.tensor(1.0), 0), False),
        ((torch.tensor(True), 0), False),
    ],
    ids=str,
)
def test_a_plain_index_has_an_unknown_whole_number_among_numbers_and_full_slices(monkeypatch, index, is_plain):
    assert not is_plain_index(index)  # outside of a trace everything is known
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert is_plain_index(index) is is_plain


def reading(x, i):
    return x[i], x[i, 0], x[:, i], x[-1, i], x[i, :, i]


def writing(x, i):
    x = x.clone()
    x[i] = 7
    x[:, i] = x[:, 0] * 2
    x[i, 1, i] += 100
    return x


@pytest.mark.parametrize("function", [reading, writing])
def test_in_a_graph_an_index_in_a_tensor_means_what_it_means_in_torch(function):
    x = torch.arange(8.0).reshape(2, 2, 2)
    compiled = jit(function, backend="eager")
    with torch.no_grad():
        for i in (0, 1, -1):
            torch.testing.assert_close(compiled(x, torch.tensor(i)), function(x, torch.tensor(i)))
