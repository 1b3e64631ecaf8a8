"""Sizes that divide others: what may share heads, layers, experts, and the sentence for what may not."""

from __future__ import annotations


def list_divisors(number: int) -> list[int]:
    """List all divisors in ascending order.

    >>> list_divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return low + [number // divisor for divisor in reversed(low) if divisor * divisor != number]


def explain_division(name: str, value: int, of: str, total: int) -> str:
    """Say that a size does not divide another, and which ones would.

    >>> explain_division("tp", 3, "heads", 8)
    'tp=3 does not divide heads=8; choose one of 1, 2, 4, 8'
    """
    return f"{name}={value} does not divide {of}={total}; choose one of {', '.join(map(str, list_divisors(total)))}"
