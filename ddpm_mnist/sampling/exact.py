"""Logarithm and cosine with bitwise identical results on every processor, unlike those of NumPy and torch.

They use only + − × ÷ and √ on float64, which IEEE 754 rounds exactly. Each operation is a separate NumPy call, so no
compiler fuses a multiplication with an addition.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SQRT_HALF = 0.7071067811865476
LN_2 = 0.6931471805599453


def log(x: Array) -> Array:
    """Return the natural logarithm of x > 0, accurate to a few units in the last place.

    x = m·2^n with m in [√½, √2), and ln m = 2·artanh(s) = 2·(s + s³/3 + s⁵/5 + …) with s = (m - 1)/(m + 1). As
    |s| < 0.172, the terms after the eleventh are below 1e-18 of the sum.
    """
    m, n = np.frexp(x)
    low = m < SQRT_HALF
    m, n = np.where(low, 2 * m, m), n - low
    s = (m - 1) / (m + 1)
    square, series = s * s, np.zeros_like(s)
    for power in range(21, 0, -2):
        series = series * square + 1 / power
    return n * LN_2 + 2 * s * series


def cosine(x: Array) -> Array:
    """Return the cosine of x in [0, π/2], accurate to 1e-16: twelve terms of 1 − x²/2·(1 − x²/12·(1 − …))."""
    square, series = x * x, np.ones_like(x)
    for power in range(24, 0, -2):
        series = 1 - square / (power * (power - 1)) * series
    return series
