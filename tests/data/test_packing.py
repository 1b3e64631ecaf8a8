"""Packing against loops that say the same in the plainest way."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.data.packing import TooLong, cut_documents, fill_rows, lay_out

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)
POLICIES = st.sampled_from(["truncate", "drop", "split"])


def cut_one_by_one(
    starts: list[int], learned: list[bool], sequence_length: int, too_long: TooLong
) -> tuple[list[tuple[int, int]], int, int]:
    pieces, num_too_long, num_without = [], 0, 0
    for begin, end in pairwise(starts):
        length = end - begin - 1
        num_too_long += length > sequence_length
        if length > sequence_length and too_long == "drop":
            continue
        offsets = range(0, length, sequence_length) if too_long == "split" else range(min(length, 1))
        mine = [(begin + offset, min(sequence_length, length - offset)) for offset in offsets]
        kept = [(first, count) for first, count in mine if any(learned[first + 1 : first + count + 1])]
        num_without += bool(mine) and not kept
        pieces += kept
    return pieces, num_too_long, num_without


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 6), POLICIES, st.randoms(use_true_random=False))
def test_documents_are_cut_as_one_by_one(lengths: list[int], sequence_length: int, too_long: TooLong, random) -> None:
    starts = [0, *np.cumsum(lengths).tolist()]
    learned = [random.random() < 0.3 for _ in range(starts[-1])]
    found = cut_documents(np.array(starts), np.array(learned), sequence_length=sequence_length, too_long=too_long)
    expected = cut_one_by_one(starts, learned, sequence_length, too_long)
    pieces = list(zip(found.starts.tolist(), found.lengths.tolist(), strict=True))
    assert (pieces, found.num_too_long, found.num_without_targets) == expected


@given(LENGTHS, st.integers(1, 6), POLICIES)
def test_without_a_mask_every_token_is_learned(lengths: list[int], sequence_length: int, too_long: TooLong) -> None:
    starts = np.array([0, *np.cumsum(lengths)])
    plain = cut_documents(starts, None, sequence_length=sequence_length, too_long=too_long)
    marked = cut_documents(starts, np.ones(starts[-1], dtype=bool), sequence_length=sequence_length, too_long=too_long)
    assert plain.starts.tolist() == marked.starts.tolist()
    assert plain.lengths.tolist() == marked.lengths.tolist()
    assert plain.num_without_targets == 0


def fill_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Sizes of the rows when each length goes into the fullest row with room."""
    rows: list[int] = []
    for length in lengths:
        fitting = [row for row, size in enumerate(rows) if size + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return rows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_rows_are_as_full_as_best_fit_makes_them(lengths: list[int]) -> None:
    rows = fill_rows(range(len(lengths)), np.array(lengths), capacity=20)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[piece] for piece in row) for row in rows]
    assert sorted(sizes) == sorted(fill_one_by_one(lengths, 20))
    assert max(sizes) <= 20


def test_rows_of_ordinary_lengths_are_nearly_full() -> None:
    lengths = np.sort(np.random.default_rng(0).geometric(1 / 120, size=2000).clip(1, 1024))[::-1]
    rows = fill_rows(range(2000), lengths, capacity=1024)
    assert lengths.sum() / (len(rows) * 1024) > 0.99


def test_pieces_lie_side_by_side_and_predict_nothing_of_each_other() -> None:
    tokens, starts = np.arange(10, 20, dtype=np.uint16), np.array([0, 4, 7, 10])
    learned = np.array([1, 0, 1, 1, 1, 1, 1, 0, 1, 1], dtype=bool)
    pieces = cut_documents(starts, learned, sequence_length=6, too_long="drop")
    tokens_BT, targets_BT, documents_BT = lay_out([np.array([1, 0]), np.array([2])], pieces, tokens, learned, width=6)
    assert tokens_BT.tolist() == [[14, 15, 10, 11, 12, -1], [17, 18, -1, -1, -1, -1]]
    assert targets_BT.tolist() == [[15, 16, -1, 12, 13, -1], [18, 19, -1, -1, -1, -1]]
    assert documents_BT.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("too_long", ["truncate", "drop", "split"])
def test_no_documents_are_no_pieces(too_long: TooLong) -> None:
    found = cut_documents(np.array([0, 1, 2]), None, sequence_length=4, too_long=too_long)
    assert (len(found.starts), found.num_too_long, found.num_without_targets) == (0, 0, 0)
