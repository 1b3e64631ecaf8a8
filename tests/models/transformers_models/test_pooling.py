"""From tokens to one vector per text: what padding holds never matters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.models.transformers_models.pooling import POOLINGS, pool_mean

REFERENCES = {
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.amax(0),
    "lasttoken": lambda rows: rows[-1],
}


def test_every_way_of_pooling_has_a_reference_here():
    assert set(POOLINGS) == set(REFERENCES)


@pytest.mark.parametrize("name", POOLINGS)
@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99), is_left=st.booleans())
def test_a_text_is_pooled_as_if_it_were_alone(name, lengths, seed, is_left):
    hidden_BTD = torch.randn(len(lengths), 5, 3, generator=torch.Generator().manual_seed(seed))
    mask_BT = torch.zeros(len(lengths), 5, dtype=torch.int64)
    spans = [slice(5 - length, 5) if is_left else slice(0, length) for length in lengths]
    for row, span in enumerate(spans):
        mask_BT[row, span] = 1
    expected = torch.stack([REFERENCES[name](hidden_BTD[row, span]) for row, span in enumerate(spans)])
    torch.testing.assert_close(POOLINGS[name](hidden_BTD, mask_BT), expected)


def test_a_mean_of_length_one_points_where_the_mean_does():
    hidden_BTD, mask_BT = torch.randn(2, 4, 8), torch.ones(2, 4)
    unit_BD = pool_mean(hidden_BTD, mask_BT)
    torch.testing.assert_close(unit_BD.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(unit_BD * hidden_BTD.mean(1).norm(dim=1, keepdim=True), hidden_BTD.mean(1))
