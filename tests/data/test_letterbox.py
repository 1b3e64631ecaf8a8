"""Images fitted into a square, and boxes taken back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.data.letterbox import GREY, letterbox, restore


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.tuples(st.sampled_from([32, 64]), st.sampled_from([32, 96])),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(max_examples=80, deadline=None)
def test_a_box_comes_back_from_where_the_letterbox_put_it(height, width, size, corners):
    picture = torch.ones(1, height, width, dtype=torch.float64)
    fitted, how = letterbox(picture, size, grey=0.0)
    assert fitted.shape == (1, *size)
    inner = fitted[0] > 0.5
    rows, columns = inner.any(1).nonzero().flatten(), inner.any(0).nonzero().flatten()
    assert inner.sum() == len(rows) * len(columns)  # one rectangle, which touches two sides
    assert len(rows) == size[0] or len(columns) == size[1]
    assert abs(len(rows) * width - len(columns) * height) <= max(width, height)  # undistorted but for whole pixels
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    box = torch.tensor([x0 * width, y0 * height, x1 * width, y1 * height], dtype=torch.float64)
    zoom = np.array([len(columns) / width, len(rows) / height] * 2)
    placed = torch.from_numpy(box.numpy() * zoom + np.array([columns[0], rows[0]] * 2))
    torch.testing.assert_close(restore(placed, how), box, rtol=1e-9, atol=1e-9)


def test_a_letterbox_keeps_the_picture_and_greys_the_rest():
    picture = torch.rand(3, 64, 32, generator=torch.Generator().manual_seed(0))
    fitted, how = letterbox(picture, (64, 64))
    assert (how.left, how.top, how.scale_x, how.scale_y) == (16, 0, 1.0, 1.0)
    torch.testing.assert_close(fitted[:, :, 16:48], picture)
    assert fitted[:, :, :16].eq(GREY).all() and fitted[:, :, 48:].eq(GREY).all()


def test_a_small_picture_may_keep_its_size():
    fitted, how = letterbox(torch.ones(3, 10, 20), (64, 64), can_enlarge=False)
    assert (how.left, how.top, how.scale_x) == (22, 27, 1.0)
    assert fitted.eq(1).sum() == 3 * 10 * 20


def test_boxes_are_cut_off_at_the_edges_of_the_picture():
    _, how = letterbox(torch.ones(3, 100, 200), (64, 64))
    assert restore(torch.tensor([-5.0, 0.0, 70.0, 64.0]), how).tolist() == [0.0, 0.0, 200.0, 100.0]


@pytest.mark.parametrize(
    "picture",
    [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4), torch.zeros(3, 0, 4)],
    ids=["bytes", "two dimensions", "empty"],
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ConfigError, match="expected"):
        letterbox(picture, (64, 64))
