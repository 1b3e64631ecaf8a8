from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.divisors import list_divisors


@given(st.integers(1, 5000))
def test_divisors_are_all_numbers_that_divide(number):
    assert list_divisors(number) == [divisor for divisor in range(1, number + 1) if number % divisor == 0]
