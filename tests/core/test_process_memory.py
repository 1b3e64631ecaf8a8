"""The peak of a process grows with what it holds, and starts anew when it is told to forget."""

import mmap
import sys

import pytest

from deepseek.core.process_memory import forget_peak, peak_bytes

SIZE = 64 * 2**20
PIECE = b"x" * 2**16


def hold_for_a_moment():
    with mmap.mmap(-1, SIZE) as block:  # fresh pages, where bytes of Python's may come from what was freed before
        for _ in range(SIZE // len(PIECE)):  # not at once, since Python's bytes may stay in the process when freed
            block.write(PIECE)
        return peak_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak never starts anew")
def test_a_block_shows_in_the_peak_until_it_is_forgotten():
    forget_peak()
    before = peak_bytes()
    assert hold_for_a_moment() >= before + 0.9 * SIZE
    assert peak_bytes() >= before + 0.9 * SIZE  # it is gone, and remembered
    forget_peak()
    assert peak_bytes() < before + 0.5 * SIZE
