import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.nn.masks import MaskConfig, count_lengths, count_positions, see

lengths = {
    "num_tokens": st.integers(1, 7),
    "start": st.integers(0, 5),
    "distance": st.integers(1, 4),
    "num_heads": st.integers(1, 4),
    "share": st.floats(0, 1),
}


def look(num_tokens, start, distance, openness=1.0):
    positions_1T = torch.arange(start, start + num_tokens)[None]
    return see(
        positions_1T,
        start + num_tokens,
        is_whole=start == 0,
        local_distance=distance,
        openness=torch.tensor(openness),
    )


@given(**lengths)
def test_a_hard_local_head_sees_its_distance_and_a_global_one_everything_earlier(
    num_tokens, start, distance, num_heads, share
):
    num_local = round(share * num_heads)
    mask = look(num_tokens, start, distance).hard_mask(num_heads, num_local)
    assert mask.shape == (1, num_heads, num_tokens, start + num_tokens)
    for head in range(num_heads):
        for query in range(num_tokens):
            for key in range(start + num_tokens):
                back = start + query - key
                expected = 0 <= back <= distance if head < num_local else back >= 0
                assert mask[0, head, query, key].item() is expected


@settings(deadline=None)
@given(**lengths, openness=st.sampled_from([0.0, 0.25, 1.0]), seed=st.integers(0, 99))
def test_a_soft_local_head_adds_its_gate_beyond_its_distance(
    num_tokens, start, distance, num_heads, share, openness, seed
):
    num_local = round(share * num_heads)
    gate_BTN = torch.randn(2, num_tokens, num_local, generator=torch.Generator().manual_seed(seed)) * 3
    bias = look(num_tokens, start, distance, openness).soft_mask(num_heads, gate_BTN)
    assert bias.shape == (2, num_heads, num_tokens, start + num_tokens)
    for row in range(2):
        for head in range(num_heads):
            for query in range(num_tokens):
                for key in range(start + num_tokens):
                    back = start + query - key
                    expected = 0.0
                    if back < 0:
                        expected = -math.inf
                    elif back > distance and head < num_local:
                        gate = gate_BTN[row, query, head].item()
                        expected = -openness * math.log1p(math.exp(-gate))
                    assert bias[row, head, query, key].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_rows_at_different_positions_see_each_their_own_past():
    positions_B1 = torch.tensor([[0], [2], [5]])
    visibility = see(positions_B1, 6, is_whole=False, local_distance=2, openness=torch.ones(()))
    mask = visibility.hard_mask(2, 1)
    local, everything = mask[:, 0, 0].int().tolist(), mask[:, 1, 0].int().tolist()
    assert everything == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert local == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


def test_a_whole_sequence_without_local_heads_needs_no_mask():
    visibility = see(torch.arange(4)[None], 4, is_whole=True, local_distance=None, openness=None)
    assert visibility.causal_B1TS is None and visibility.far_B1TS is None


@pytest.mark.parametrize("positions", [[5, 6, 7, 8], [0, 1, 0, 1]])
def test_a_whole_sequence_is_causal_whatever_its_positions_are_called(positions):
    named, plain = (
        see(torch.tensor([each]), 4, is_whole=True, local_distance=1, openness=torch.ones(())).hard_mask(2, 1)
        for each in (positions, [0, 1, 2, 3])
    )
    assert torch.equal(named, plain)


def test_the_gate_is_trained_through_the_mask():
    gate_BTN = torch.zeros(1, 4, 1, requires_grad=True)
    bias = look(4, 0, 1).soft_mask(2, gate_BTN)
    bias[bias.isfinite()].sum().backward()
    # Queries 2 and 3 see one and two far keys; d log sigmoid(0) = 1/2 for each.
    assert gate_BTN.grad.flatten().tolist() == [0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(("share", "num_heads", "expected"), [(0, 4, 0), (1, 4, 4), (0.5, 4, 2), (0.3, 4, 1)])
def test_the_share_of_local_heads(share, num_heads, expected):
    assert MaskConfig(local_heads=share).num_local_heads(num_heads, layer=0) == expected


def test_every_nth_layer_is_wholly_global():
    config = MaskConfig(local_heads=0.5, global_layer_every=3)
    assert [config.num_local_heads(4, layer) for layer in range(7)] == [2, 2, 0, 2, 2, 0, 2]


def test_heads_close_in_a_straight_line():
    config = MaskConfig(opening_steps=4)
    assert [config.openness_at(step) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert MaskConfig().openness_at(0) == 1


@pytest.mark.parametrize(
    "values", [{"local_distance": 0}, {"local_heads": 1.5}, {"global_layer_every": -1}, {"opening_steps": -1}]
)
def test_numbers_without_a_meaning_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        MaskConfig(**values)


@pytest.mark.parametrize("window", [1, 3, 7, 8])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_window_is_the_last_tokens_with_the_token_itself(window, is_whole):
    positions_BT = torch.arange(8)[None]
    visibility = see(positions_BT, 8, is_whole=is_whole, local_distance=None, openness=None, window=window)
    expected = [[0 <= query - key < window for key in range(8)] for query in range(8)]
    causal = [[key <= query for key in range(8)] for query in range(8)]
    assert (visibility.causal_B1TS is None) == is_whole
    if window == 8:  # nothing is farther away
        assert visibility.window_B1TS is None
    else:
        assert visibility.window_B1TS[0, 0].tolist() == expected
    if not is_whole:
        assert visibility.causal_B1TS[0, 0].tolist() == causal


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 3))
def test_tokens_see_their_own_document_alone_whatever_else_cuts_their_view(lengths, window, distance):
    documents = [number for number, length in enumerate(lengths) for _ in range(length)]
    documents_BT = torch.tensor([documents])
    size = len(documents)
    visibility = see(
        count_positions(documents_BT),
        size,
        is_whole=True,
        local_distance=distance,
        openness=torch.ones(()),
        window=window,
        documents_BT=documents_BT,
    )
    causal = torch.tensor([[k <= q and documents[k] == documents[q] for k in range(size)] for q in range(size)])
    back = torch.tensor([[q - k for k in range(size)] for q in range(size)])
    assert torch.equal(visibility.causal_B1TS[0, 0], causal)
    assert torch.equal(visibility.hard_mask(2, 1)[0], torch.stack((causal & (back <= distance), causal)))
    if size > window:
        assert torch.equal(visibility.window_B1TS[0, 0], causal & (back < window))
    bias = visibility.soft_mask(2, torch.zeros(1, size, 1))
    assert torch.equal(bias.isinf()[0], (~causal).expand(2, -1, -1))


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_positions_and_lengths_are_those_in_the_documents(rows):
    width = max(map(sum, rows))
    rows = [[*row, width - sum(row)] if sum(row) < width else row for row in rows]
    documents_BT = torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in rows])
    assert count_positions(documents_BT).tolist() == [[at for n in row for at in range(n)] for row in rows]
    assert count_lengths(documents_BT).tolist() == [[n for n in row for _ in range(n)] for row in rows]
