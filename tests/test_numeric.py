"""What counts as a number in an argument."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from bark_fast.numeric import is_number, is_whole

WHOLE = [0, -3, 2**70, np.int64(5), np.uint8(7)]
BROKEN = [0.5, np.float32(1.5), np.float64(2.0), Fraction(1, 3)]
NEITHER = [True, np.bool_(True), "1", None, 1j, [1], float("nan"), float("inf"), np.float32("nan")]


@pytest.mark.parametrize("value", WHOLE)
def test_integers_are_whole_numbers(value: object) -> None:
    assert is_whole(value) and is_number(value)


@pytest.mark.parametrize("value", BROKEN)
def test_fractions_are_numbers_only(value: object) -> None:
    assert is_number(value) and not is_whole(value)


@pytest.mark.parametrize("value", NEITHER)
def test_truth_values_text_and_what_is_not_finite_are_neither(value: object) -> None:
    assert not is_number(value) and not is_whole(value)
