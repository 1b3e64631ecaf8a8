"""Seeded random numbers: uniform, independent, and the same under the same seed."""

import torch

from deepseek.compiler.jit.tracing.random_numbers import advance, hash_bits, uniform


def test_seeded_numbers_are_uniform_and_independent_of_their_neighbours():
    seed = torch.tensor(12345)
    numbers = uniform((200_000,), advance(seed, 2), torch.device("cpu")).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / 200_000) ** 0.5
    counts = torch.histc(numbers, 64, 0, 1)
    chi_square = ((counts - 3125) ** 2 / 3125).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    others = [uniform((200_000,), advance(seed, salt), torch.device("cpu")).double() for salt in (3, 4)]
    others.append(numbers.roll(1))
    for other in others:
        correlation = torch.corrcoef(torch.stack([numbers, other]))[0, 1]
        assert abs(correlation) < 5 / 200_000**0.5


def test_the_hash_takes_different_numbers_to_different_numbers():
    numbers = torch.arange(300_000)
    assert hash_bits(numbers).unique().numel() == numbers.numel()
    assert hash_bits(numbers).max() < 2**32
