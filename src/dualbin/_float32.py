"""Rounding to float32 in integers, since a cast goes by the rounding mode that the program has set in the C library."""

from __future__ import annotations

import math

_DIGITS = 24  #: binary, of a float32
_LEAST = -125  #: exponent, as `frexp` gives it, of the least float32 that has all of them


def nearest_float32(x: float) -> float:
    """The float32 that is nearest to `x`, half to even, as a float: from there on every cast to float32 is exact."""
    if x == 0 or not math.isfinite(x):
        return x
    mantissa, exponent = math.frexp(x)
    whole = int(math.ldexp(abs(mantissa), 53))
    digits = _DIGITS - max(0, _LEAST - exponent)
    cut = 53 - digits
    kept, rest = divmod(whole, 1 << cut)
    half = 1 << (cut - 1)
    kept += rest > half or (rest == half and kept % 2 == 1)
    # of a number above the largest float32 this is infinity when it is cast, as it is without this function
    return math.copysign(math.ldexp(kept, exponent - digits), x)
