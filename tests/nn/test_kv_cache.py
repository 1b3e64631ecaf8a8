import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.nn.kv_cache import KVCache

LAYERS, SLOTS, HEADS, LENGTH, SIZE = 2, 4, 2, 6, 3


def make_cache(dtype=torch.float32):
    return KVCache(LAYERS, SLOTS, HEADS, LENGTH, SIZE, dtype)


@settings(deadline=None)
@given(
    first=st.integers(0, SLOTS - 1),
    writes=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, LENGTH - 1), st.integers(0, 9)), max_size=6),
    data=st.data(),
)
def test_what_is_written_is_read_back_where_it_was_put_and_nowhere_else(first, writes, data):
    num_slots = data.draw(st.integers(1, SLOTS - first))
    cache = make_cache()
    expected = torch.zeros(LAYERS, 2, SLOTS, HEADS, LENGTH, SIZE)
    for layer, position, seed in writes:
        new = torch.randn(2, num_slots, 1, HEADS, SIZE, generator=torch.Generator().manual_seed(seed))
        positions_B1 = torch.tensor([[(position + slot) % LENGTH] for slot in range(num_slots)])
        cache.view(first, num_slots, LENGTH).layers[layer].write(new[0], new[1], positions_B1)
        for slot in range(num_slots):
            expected[layer, :, first + slot, :, (position + slot) % LENGTH] = new[:, slot, 0]
    for layer, seen in enumerate(cache.view(0, SLOTS, LENGTH).layers):
        torch.testing.assert_close(torch.stack((seen.keys_SKLH, seen.values_SKLH)), expected[layer], rtol=0, atol=0)


def test_a_cleared_slot_is_zeros_and_its_neighbours_stay():
    cache = make_cache()
    new = torch.full((SLOTS, 1, HEADS, SIZE), float("nan"))
    for layer in cache.view(0, SLOTS, LENGTH).layers:
        layer.write(new, new, torch.zeros(SLOTS, 1, dtype=torch.long))
    cache.clear_slot(2)
    for layer in cache.view(0, SLOTS, LENGTH).layers:
        for stored in (layer.keys_SKLH, layer.values_SKLH):
            assert [bool(stored[slot].isnan().any()) for slot in range(SLOTS)] == [True, True, False, True]


def test_writing_returns_everything_up_to_the_views_length():
    cache = make_cache()
    new = torch.ones(1, 2, HEADS, SIZE)
    keys, values = cache.view(1, 1, 4).layers[0].write(new, 2 * new, torch.tensor([[2, 3]]))
    assert keys.shape == values.shape == (1, HEADS, 4, SIZE)
    assert keys[0, 0, :, 0].tolist() == [0, 0, 1, 1] and values[0, 0, :, 0].tolist() == [0, 0, 2, 2]


def test_one_row_of_positions_serves_several_slots():
    cache = make_cache()
    new = torch.arange(2.0)[:, None, None, None].expand(2, 3, HEADS, SIZE)
    keys, _ = cache.view(0, 2, 3).layers[0].write(new, new, torch.arange(3)[None])
    assert keys[:, 0, :, 0].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_copied_slot_is_equal_and_separate():
    cache = make_cache()
    ones = torch.ones(1, 1, HEADS, SIZE)
    cache.view(0, 1, LENGTH).layers[1].write(ones, ones, torch.tensor([[5]]))
    cache.copy_slot(0, 2)
    cache.view(0, 1, LENGTH).layers[1].write(3 * ones, ones, torch.tensor([[5]]))
    keys_SKLH = cache.view(0, SLOTS, LENGTH).layers[1].keys_SKLH
    assert keys_SKLH[:, 0, 5, 0].tolist() == [3, 0, 1, 0]


def test_values_are_kept_in_the_caches_dtype():
    cache = make_cache(torch.bfloat16)
    new = torch.full((1, 1, HEADS, SIZE), 1 + 2**-10)
    keys, _ = cache.view(0, 1, 1).layers[0].write(new, new, torch.tensor([[0]]))
    assert keys.dtype == torch.bfloat16 and keys.unique().tolist() == [1.0]


def test_its_memory_is_that_of_keys_and_values_of_every_slot():
    assert make_cache().memory_bytes == 2 * LAYERS * SLOTS * HEADS * LENGTH * SIZE * 4
    assert make_cache(torch.bfloat16).memory_bytes == 2 * LAYERS * SLOTS * HEADS * LENGTH * SIZE * 2


@pytest.mark.parametrize(("first", "num_slots", "length"), [(3, 2, 1), (0, 5, 1), (-1, 1, 1), (0, 1, 7)])
def test_a_view_beyond_the_cache_is_refused(first, num_slots, length):
    with pytest.raises(ConfigError, match="a KV cache with 4 slots of length 6; make a larger cache"):
        make_cache().view(first, num_slots, length)


def test_a_token_beyond_the_view_is_not_lost_silently():
    new = torch.ones(1, 1, HEADS, SIZE)
    with pytest.raises(IndexError):
        make_cache().view(0, 1, 3).layers[0].write(new, new, torch.tensor([[3]]))
