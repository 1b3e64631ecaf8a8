import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.core.units import (
    format_bytes,
    format_count,
    format_seconds,
    parse_bytes,
    parse_count,
    parse_length,
    parse_seconds,
)

exact = st.integers(0, 2**53)


@given(exact)
def test_plain_numbers_are_themselves(number):
    assert parse_bytes(str(number)) == parse_count(f" {number} ") == number
    assert parse_seconds(str(number)) == number


@given(st.integers(0, 8), st.integers(0, 5), st.booleans(), st.sampled_from(["", " "]))
def test_sizes_are_powers_of_1000_or_with_an_i_of_1024(number, power, is_binary, gap):
    prefix = ["", "k", "M", "G", "T", "P"][power]
    unit = prefix + ("i" if is_binary and prefix else "") + "B"
    assert parse_bytes(f"{number}{gap}{unit}") == number * (1024 if is_binary and prefix else 1000) ** power
    assert parse_bytes(f"{number}{gap}{unit.lower()}") == parse_bytes(f"{number}{gap}{unit.upper()}")


@given(st.integers(0, 10**15))
def test_a_shown_size_reads_back_to_its_shown_digits(num_bytes):
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.051, abs=0.5)


@given(st.integers(0, 10**15))
def test_a_shown_count_reads_back_to_its_shown_digits(count):
    assert parse_count(format_count(count)) == pytest.approx(count, rel=0.051, abs=0.5)


@given(st.floats(0, 1e18, allow_nan=False))
def test_a_shown_size_is_short(num_bytes):
    assert len(format_bytes(num_bytes)) <= len("1000.0 PB")


@given(st.floats(60, 3e6))
def test_shown_minutes_and_hours_are_the_seconds(duration_s):
    parts = format_seconds(duration_s).split()
    factors = {"h": 3600, "min": 60, "s": 1}
    shown_s = sum(int(value) * factors[unit] for value, unit in zip(parts[::2], parts[1::2], strict=True))
    assert abs(shown_s - duration_s) <= (60 if "h" in parts else 0.5)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("250ms", 0.25), ("3us", 3e-6), ("5m", 300), ("5 min", 300), ("1.5h", 5400), ("2d", 172800)],
)
def test_durations(text, seconds):
    assert math.isclose(parse_seconds(text), seconds)


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1,5GB", "1.GB", "24 apples", "1e", "0x10", "nan", "inf", "\u0661GB"]
)
@pytest.mark.parametrize("parse", [parse_bytes, parse_count, parse_seconds])
def test_anything_else_is_refused_with_an_example(parse, text):
    with pytest.raises(ConfigError, match=r"is not a (size|count|duration); write a number and a unit, for example"):
        parse(text)


@pytest.mark.parametrize("parse", [parse_bytes, parse_count, parse_seconds])
def test_a_number_beyond_floats_is_refused(parse):
    with pytest.raises(ConfigError, match="'1e999' is too large"):
        parse("1e999")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.0 kB"), (1000, "1 kB"), (1536, "1.5 kB"), (123_456, "123 kB")],
)
def test_sizes_as_they_are_shown(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"), [(0, "0 ms"), (0.0004, "0 ms"), (1, "1.0 s"), (60, "1 min 0 s"), (3661, "1 h 1 min")]
)
def test_durations_as_they_are_shown(duration_s, text):
    assert format_seconds(duration_s) == text


@given(st.integers(1, 4096), st.integers(0, 2), st.booleans())
def test_lengths_are_powers_of_1024(number, power, is_upper):
    unit = ("", "k", "m")[power]
    assert parse_length(f"{number}{unit.upper() if is_upper else unit}") == number * 1024**power


@pytest.mark.parametrize("text", ["0", "1.5", "4kB", "k", "-1", "0.3k", "4b"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ConfigError, match="4096 or 4k"):
        parse_length(text)
