import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.nn.rotary import rotary_table, rotate


def turn(x_BTNH, positions_BT, theta):
    """Channel i and channel i + H/2 as one complex number, multiplied by e^(i angle), in float64."""
    half = x_BTNH.shape[-1] // 2
    z = torch.complex(x_BTNH[..., :half].double(), x_BTNH[..., half:].double())
    frequencies = torch.tensor([theta ** (-pair / half) for pair in range(half)], dtype=torch.float64)
    angles_BTNH = positions_BT[..., None, None].double() * frequencies
    z = z * torch.polar(torch.ones_like(angles_BTNH), angles_BTNH)
    return torch.cat((z.real, z.imag), dim=-1)


@settings(deadline=None, max_examples=30)
@given(
    half=st.integers(1, 8),
    theta=st.sampled_from([10.0, 1e4, 5e5]),
    positions=st.lists(st.integers(0, 999), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_it_is_multiplication_by_a_complex_number(half, theta, positions, seed):
    x_BTNH = torch.randn(2, len(positions), 3, 2 * half, generator=torch.Generator().manual_seed(seed))
    positions_BT = torch.tensor([positions, positions[::-1]])
    table = rotary_table(1000, 2 * half, theta=theta)
    turned = rotate(x_BTNH, table[:, positions_BT])
    torch.testing.assert_close(turned.double(), turn(x_BTNH, positions_BT, theta), rtol=1e-5, atol=1e-6)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = rotary_table(200, 16, theta=1e4).double()

    def score(query_position, key_position):
        turned = [rotate(x, table[:, torch.tensor([[at]])]) for x, at in ((q, query_position), (k, key_position))]
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(107, 103), rel=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-2)


def test_one_row_of_positions_serves_a_whole_batch():
    x_BTNH = torch.randn(3, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    table = rotary_table(4, 8, theta=1e4)
    shared, own = (rotate(x_BTNH, table[:, each]) for each in (torch.arange(4)[None], torch.arange(4).expand(3, -1)))
    torch.testing.assert_close(shared, own, rtol=0, atol=0)


def test_the_table_is_exact_to_float32_at_far_positions():
    table = rotary_table(100_000, 4, theta=1e4)
    angle = 99_999 * 1e4**-0.5
    assert table.dtype == torch.float32
    assert table[0, -1].tolist() == pytest.approx([math.cos(99_999), math.cos(angle)] * 2, abs=1e-7)
    assert table[1, -1].tolist() == pytest.approx([math.sin(99_999), math.sin(angle)] * 2, abs=1e-7)


def test_the_dtype_of_the_input_is_kept():
    table = rotary_table(4, 8, theta=1e4)[:, torch.arange(4)[None]]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert rotate(torch.ones(1, 4, 2, 8, dtype=dtype), table).dtype == dtype
