"""How a bound is written: with a few digits, and never below its value.

>>> rounded_up(1.23401), rounded_up(0.1), rounded_up(float("inf"))
('1.235', '0.1', 'inf')
"""

from decimal import ROUND_CEILING, Context


def rounded_up(value: float, num_digits: int = 4) -> str:
    """A bound as text.

    Args:
        value: It; may be ``inf``.
        num_digits: Significant digits, at least 1.
    """
    nearest = f"{value:.{num_digits}g}"
    if float(nearest) >= value:
        return nearest
    up = Context(prec=num_digits, rounding=ROUND_CEILING)
    return f"{float(up.create_decimal_from_float(float(value))):.{num_digits}g}"
