"""A bound's text is never below the bound."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.accounting.rounding import rounded_up


@given(st.floats(0, 1e300), st.integers(1, 12))
def test_never_below_and_never_more_than_a_digit_above(value, num_digits):
    found = float(rounded_up(value, num_digits))
    assert found >= value
    assert found - value <= 10 ** (1 - num_digits) * value * (1 + 1e-9) + 5e-324


@pytest.mark.parametrize(
    "value, text",
    [(0.1, "0.1"), (1.23401, "1.235"), (9.99951, "10"), (0.0, "0"), (math.inf, "inf")],
)
def test_few_digits(value, text):
    assert rounded_up(value) == text
