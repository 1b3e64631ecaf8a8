"""Quantities as people write them: bytes, counts and durations, read and shown.

Users type `24GB`, `1.2M`, `30s`; code holds plain numbers whose names carry the unit (`memory_bytes`, `timeout_s`).
Prefixes are decimal, and binary with an `i` (`1GiB` is 2**30 bytes), as in IEC 80000-13.
"""

from __future__ import annotations

import math
import re

from deepseek.core.errors import ConfigError

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_COUNT_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_LENGTH_FACTORS = {"": 1, "k": 1024, "m": 1024**2}
_BYTE_FACTORS = {"": 1, "b": 1} | {
    prefix + ("ib" if binary else "b"): (1024 if binary else 1000) ** power
    for power, prefix in enumerate("kmgtp", start=1)
    for binary in (False, True)
}
_SECOND_FACTORS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str) -> int:
    """Bytes in `text`: `parse_bytes("1.5 GiB")`.

    >>> parse_bytes("24GB"), parse_bytes("1KiB")
    (24000000000, 1024)
    """
    return round(_parse(text, _BYTE_FACTORS, "size", "24GB"))


def parse_count(text: str) -> int:
    """A count with an optional K, M, B or T.

    >>> parse_count("1.2M"), parse_count("7e9")
    (1200000, 7000000000)
    """
    return round(_parse(text, _COUNT_FACTORS, "count", "1.2M"))


def parse_length(text: str) -> int:
    """Tokens of a sequence, where a K is 1024 of them, as lengths of contexts are written.

    >>> parse_length("4096"), parse_length("128k")
    (4096, 131072)
    """
    length = _parse(text, _LENGTH_FACTORS, "length", "4096 or 4k")
    if length < 1 or length != int(length):
        raise ConfigError(f"{text!r} is no whole number of tokens; write for example 4096 or 4k")
    return int(length)


def parse_seconds(text: str) -> float:
    """Seconds in a duration such as `30s`, `5m` or `250ms`.

    >>> parse_seconds("5m")
    300.0
    """
    return _parse(text, _SECOND_FACTORS, "duration", "30s")


def format_bytes(num_bytes: float) -> str:
    """`num_bytes` with a decimal prefix.

    >>> format_bytes(24_500_000)
    '24.5 MB'
    """
    return _format(num_bytes, ["B", "kB", "MB", "GB", "TB", "PB"])


def format_count(count: float) -> str:
    """`count` with a decimal prefix.

    >>> format_count(7_241_000)
    '7.2M'
    """
    return _format(count, ["", "K", "M", "B", "T"]).replace(" ", "")


def format_seconds(duration_s: float) -> str:
    """A duration as people read it.

    >>> format_seconds(0.0123), format_seconds(12.3), format_seconds(192)
    ('12 ms', '12.3 s', '3 min 12 s')
    """
    if duration_s < 1:
        return f"{duration_s * 1000:.0f} ms"
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _parse(text: str, factors: dict[str, int] | dict[str, float], noun: str, example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in factors:
        raise ConfigError(f"{text!r} is not a {noun}; write a number and a unit, for example {example}")
    value = float(match[1]) * factors[match[2].lower()]
    if math.isinf(value):
        raise ConfigError(f"{text!r} is too large for a {noun}; write one such as {example}")
    return value


def _format(value: float, suffixes: list[str]) -> str:
    for suffix in suffixes[:-1]:
        if abs(value) < 999.5:
            return (f"{value:.1f}" if abs(value) < 99.95 and value != int(value) else f"{value:.0f}") + f" {suffix}"
        value /= 1000
    return f"{value:.1f} {suffixes[-1]}"
