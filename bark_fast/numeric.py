"""What counts as a number in an argument: Python's and numpy's, but no truth value."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether this is an integer. numpy's pass for `int`, which they behave as."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a finite number. Integers, and numpy's numbers, pass for `float`."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
