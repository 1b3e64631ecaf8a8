"""Padding, splitting and joining against plain indexing; what cannot be read off shapes or numbers is refused."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compiler.dynamic_shapes.padding import (
    InputRole,
    PaddingRefusedError,
    compare,
    cut_length,
    find_input_roles,
    find_roles,
    find_varying,
    join_rows,
    name_leaves,
    pad_length,
    read_lengths,
    take_rows,
)


def test_leaves_of_nested_arguments_have_names():
    names, leaves, _ = name_leaves({"x": 1, "more": [2, {"y": 3}]})
    assert dict(zip(names, leaves, strict=True)) == {"x": 1, "more[0]": 2, "more[1]['y']": 3}


def test_dims_that_vary_are_found_over_all_calls():
    history = [((4, 10), (10,)), ((4, 12), (12,)), ((3, 12), (12,))]
    assert find_varying(history) == [(0, 1), (0,)]


def roles_of(shapes, history=(), given=None):
    return find_input_roles(shapes, 0, history or [tuple(shapes)], given)


def test_dims_as_large_as_the_mask_are_rows_and_lengths():
    roles = roles_of([(4, 10), (4, 10, 7), (10,), (7, 7), None, (4,)])
    assert roles == [
        InputRole(True, (1,)),
        InputRole(True, (1,)),
        InputRole(False, (0,)),
        InputRole(False, ()),
        InputRole(False, ()),
        InputRole(True, ()),
    ]


def test_a_feature_dim_as_large_as_the_length_is_not_taken_for_one():
    with pytest.raises(PaddingRefusedError, match="name them with dims="):
        roles_of([(4, 10), (4, 10, 10)])
    # once the length has changed and the feature dim has not, it is clear
    roles = roles_of([(4, 10), (4, 10, 10)], history=[((4, 12), (4, 12, 10)), ((4, 10), (4, 10, 10))])
    assert roles[1] == InputRole(True, (1,))
    assert roles_of([(4, 10), (4, 10, 10)], given={1: (1, 2)})[1] == InputRole(True, (1, 2))


def test_a_vector_is_unclear_while_there_are_as_many_rows_as_positions():
    with pytest.raises(PaddingRefusedError):
        roles_of([(10, 10), (10,)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=1, max_size=6))
def test_lengths_reach_to_the_last_one_of_each_row(rows):
    expected = [max((place + 1 for place, bit in enumerate(row) if bit), default=1) for row in rows]
    assert read_lengths(torch.tensor(rows)) == expected
    assert read_lengths(torch.tensor(rows, dtype=torch.bool)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("length", [2, 5, 8])
def test_a_dim_is_cut_or_padded_at_its_end(dtype, length):
    x = torch.randint(0, 2, (3, 5, 4)).to(dtype)
    padded = pad_length(x, (1,), length, 1)
    assert padded.dtype == dtype
    assert padded.shape == (3, length, 4)
    assert torch.equal(padded[:, :5], x[:, :length])
    assert bool((padded[:, 5:] == 1).all())


def test_pieces_hold_their_rows_at_their_length():
    tokens, bias, scale = torch.arange(12).view(3, 4), torch.arange(4), 2.0
    roles = [InputRole(True, (1,)), InputRole(False, (0,)), InputRole(False, ())]
    taken = take_rows([tokens, bias, scale], roles, torch.tensor([2, 0]), 3, [0.0] * 3)
    assert taken[0].tolist() == [[8, 9, 10], [0, 1, 2]]
    assert taken[1].tolist() == [0, 1, 2]
    assert taken[2] == 2.0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_joined_pieces_stand_where_their_rows_were(requires_grad):
    whole = torch.randn(5, 6, 3, requires_grad=requires_grad)
    lengths = [6, 2, 4, 2, 1]
    order = torch.tensor([4, 1, 3, 2, 0])
    pieces = [[whole[[4, 1, 3], :2] * 1], [whole[[2, 0]] * 1]]
    (joined,) = join_rows(pieces, order, [(1,)], 6)
    for row, length in enumerate([2 if length <= 2 else 6 for length in lengths]):
        assert torch.equal(joined[row, :length], whole[row, :length])
        assert not joined[row, length:].any()
    if requires_grad:
        joined.sum().backward()
        assert whole.grad.sum() == joined.count_nonzero()


def test_outputs_without_a_length_are_joined_by_rows_alone():
    pieces = [[torch.tensor([[1.0], [2.0]]), 7], [torch.tensor([[3.0]]), 7]]
    scores, constant = join_rows(pieces, torch.tensor([2, 0, 1]), [(), ()], 9)
    assert scores.tolist() == [[2.0], [3.0], [1.0]]
    assert constant == 7


def test_length_dims_of_outputs_are_those_that_followed():
    whole, part = [torch.zeros(4, 10, 3), torch.zeros(4, 5), 1], [torch.zeros(2, 6, 3), torch.zeros(2, 5), 1]
    assert find_roles(whole, part, length=10, piece_length=6, rows=(4, 2)) == [(1,), (), ()]
    padded = [torch.zeros(4, 16, 3)]
    assert find_roles([whole[0]], padded, length=10, piece_length=16) == [(1,)]
    assert cut_length(padded, [(1,)], 10)[0].shape == (4, 10, 3)


@pytest.mark.parametrize(
    ("whole", "part", "message"),
    [
        ([torch.zeros(())], [torch.zeros(())], "no row for each"),
        ([torch.zeros(4, 5)], [torch.zeros(2, 3)], "not the same length"),  # half of the length, rounded up
        ([torch.zeros(4, 10)], [torch.zeros(2, 6, 1)], "has shape"),
        ([torch.zeros(4)], [torch.zeros(2), torch.zeros(2)], "returns 1 values"),
        ([object()], [object()], "cannot be cut"),
        ([10], [6], "cannot be cut"),
    ],
)
def test_outputs_that_follow_neither_rows_nor_length_are_refused(whole, part, message):
    with pytest.raises(PaddingRefusedError, match=message):
        find_roles(whole, part, length=10, piece_length=6, rows=(4, 2))


def test_numbers_under_the_mask_do_not_count():
    mask = torch.tensor([[1, 1, 0]])
    one, other = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, 2.0, 9.0]])
    compare([one], [other], mask=mask, roles=[(1,)])
    with pytest.raises(PaddingRefusedError, match="changes by"):
        compare([one], [other])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_passes_and_errors_do_not(dtype):
    reference = torch.linspace(-3, 3, 99, dtype=dtype)
    compare([reference * (1 + torch.finfo(dtype).eps)], [reference])
    with pytest.raises(PaddingRefusedError):
        compare([reference + 0.5], [reference])


def test_what_is_not_a_number_must_be_so_in_both():
    nan, infinity = float("nan"), float("inf")
    compare([torch.tensor([nan, infinity, 1.0])], [torch.tensor([nan, infinity, 1.0])])
    for wrong in ([1.0, infinity, 1.0], [nan, 1.0, 1.0], [nan, -infinity, 1.0], [nan, infinity, nan]):
        with pytest.raises(PaddingRefusedError):
            compare([torch.tensor(wrong)], [torch.tensor([nan, infinity, 1.0])])


def test_whole_numbers_must_be_equal():
    with pytest.raises(PaddingRefusedError, match="output 0"):
        compare([torch.tensor([1, 2])], [torch.tensor([1, 3])])


def test_padding_is_what_torch_pads():
    x = torch.randn(2, 3, 4)
    assert torch.equal(pad_length(x, (0, -1), 5, 7.0), F.pad(x[:, :, :5], (0, 1, 0, 0, 0, 3), value=7.0))
