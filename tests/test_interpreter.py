"""Triton's interpreter as these tests run it: launches leave the language, and one another, alone."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402  (after the skip)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")


@triton.jit
def _half_sum(values, FAIL: tl.constexpr):
    tl.static_assert(not FAIL, "asked to")
    return tl.sum(tl.where(tl.arange(0, 4) % 2 == 0, values, 0.0), axis=0)


@triton.jit
def _kernel(values, out, FAIL: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out + row, _half_sum(tl.load(values + 4 * row + tl.arange(0, 4)), FAIL))


def test_the_language_is_itself_again_after_a_launch() -> None:
    before = tl.load, tl.where, tl.math.exp, tl.tensor.__add__
    values = torch.arange(12.0)
    for fail in (False, True, False):
        out = torch.zeros(3)
        if fail:
            with pytest.raises(Exception, match="asked to"):
                _kernel[(3,)](values, out, fail)
        else:
            _kernel[(3,)](values, out, fail)
            assert out.tolist() == [2.0, 10.0, 18.0]
        assert (tl.load, tl.where, tl.math.exp, tl.tensor.__add__) == before
