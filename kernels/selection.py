"""Exact top-k and top-p without a sort: bisection on order-preserving integer keys.

A cut is a key `lo` and a range of indices: kept is what lies above lo, and of those equal to lo + 1 (the lowest
kept value) the ones whose index is in the range. Values are ordered by value, and among equal ones suno keeps
the lowest indices, Hugging Face the highest, as a stable sort in each dialect's direction does.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-(2**31))
"""Below the key of every number; padding has it."""
LOWEST_FINITE_KEY = tl.constexpr(-2139095040)
VALUE_ROUNDS = tl.constexpr(8)
"""Rounds that split the range of values evenly, as logits lie; later ones split the keys, which always ends."""
VALUE_REACH = tl.constexpr(32.0)
"""Such a round looks this far below the highest value: what is farther down weighs less than e^-32."""
FARTHEST = tl.constexpr(2**20)
"""More than there are columns."""
LAST_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def order_key(x):
    """int32 that orders as fp32 x does (not for NaN)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    """The fp32 number of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def any_row(flag):
    """Whether a flag (ROWS,) holds in any row, as a scalar."""
    return tl.max(flag.to(tl.int32), axis=0) > 0


@triton.jit
def weights(key, top):
    """exp(value - top) of keys (ROWS, N); 0 for padding."""
    return tl.where(key > LOWEST_KEY, tl.exp(key_value(key) - top[:, None]), 0.0)


@triton.jit
def _thresholds(lo, hi, evenly_by_value, T: tl.constexpr):
    """T ascending keys (ROWS, T) that split (lo, hi], each in [lo, hi)."""
    odd = 2 * tl.arange(0, T)[None, :] + 1
    span = hi.to(tl.int64) - lo
    by_key = (lo[:, None] + ((span[:, None] * odd) // (2 * T))).to(tl.int32)
    top = key_value(hi)
    # a finite stand-in where lo is padding or -inf
    bottom = tl.maximum(key_value(tl.maximum(lo, LOWEST_FINITE_KEY)), top - VALUE_REACH)
    value = bottom[:, None] + (top - bottom)[:, None] * (odd.to(tl.float32) / (2 * T))
    by_value = tl.minimum(tl.maximum(order_key(value), lo[:, None]), (hi - 1)[:, None])
    return tl.where(evenly_by_value, by_value, by_key)


@triton.jit
def search(key, top, lo, hi, number, target, by_mass, from_below, enough, MASS: tl.constexpr, T: tl.constexpr):
    """Raise lo towards the smallest key t that holds: lo + 1 is t, or `number` (keys above lo) is at most
    `enough`.

    t holds when what lies above it counts at most `target`; by_mass, when its weight is at most that;
    from_below, when the weight up to and including t exceeds it, weights being exp(value - top). key: (ROWS,
    N); the rest (ROWS,), number, target and top fp32. MASS: whether any row may go by mass. hi is taken to
    hold; lo to fail, and number to be the count above it. A row with hi = lo + 1 stays as it is. T thresholds
    are tried a round.
    """
    key3 = key[:, :, None]
    above_hi = number * 0.0
    rounds = 0
    # carried as a scalar: Triton 3.6 cannot compile a loop whose condition reduces what the loop carries
    searching = any_row((hi > lo + 1) & (number > enough))
    while searching:
        mid = _thresholds(lo, hi, rounds < VALUE_ROUNDS, T)
        above = key3 > mid[:, None, :]
        count = tl.sum(above.to(tl.float32), axis=1)
        total = count
        if MASS:
            if any_row(by_mass):
                weight3 = weights(key, top)[:, :, None]
                mass = tl.sum(tl.where(above != from_below[:, None, None], weight3, 0.0), axis=1)
                total = tl.where(by_mass[:, None], mass, count)
        holds = ((total <= target[:, None]) != from_below[:, None]) & (mid > lo[:, None])
        number = tl.minimum(number, tl.min(tl.where(holds | (mid <= lo[:, None]), 3e38, count), axis=1))
        above_hi = tl.maximum(above_hi, tl.max(tl.where(holds, count, 0.0), axis=1))
        lo = tl.max(tl.where(holds, lo[:, None], mid), axis=1)
        hi = tl.min(tl.where(holds, mid, hi[:, None]), axis=1)
        # one key left, or exactly as many as were asked for: what is above lo is the answer
        settled = (number - above_hi <= 1) | ((by_mass == 0) & (number <= target + 1))
        searching = any_row((hi > lo + 1) & (number > enough) & (settled == 0))
        rounds += 1
    return lo, number


@triton.jit
def cut(key, index, top, lo, number, top_k, top_p, mass, dropped, hf, T: tl.constexpr):
    """Top-k, then top-p: (lo, first, last); kept are keys above lo, those equal to lo + 1 with first <= index
    <= last.

    key, index: (ROWS, N). top: the highest value, of weight 1. lo, number: all keys above lo are here, and so
    many. top_k: 0 for none. top_p: as in `RuleFloat`, negative for none. mass: weight of the whole row, what
    suno's top_p is a share of. dropped: weight of the keys up to lo, which Hugging Face's top_p counts first; 0
    for suno, and where there is a top_k, whose loss counts nowhere.
    """
    highest = tl.max(key, axis=1)
    first = lo * 0
    last = first + LAST_INDEX
    none = top_k < 0
    by_k = top_k > 0
    if any_row(by_k):
        hi = tl.where(by_k, highest, lo + 1)
        lo, number = search(key, top, lo, hi, number, top_k.to(tl.float32) - 1, none, none, 0.0, False, T)
    by_p = top_p >= 0
    if any_row(by_p):
        key = tl.where(key > lo[:, None], key, LOWEST_KEY)
        target = top_p * tl.where(hf, tl.sum(weights(key, top), axis=1) + dropped, mass) - dropped
        hi = tl.where(by_p, tl.maximum(highest, lo + 1), lo + 1)
        lo, number = search(key, top, lo, hi, number, target, by_p, hf & by_p, 0.0, True, T)
        lowest = (lo + 1)[:, None]
        tied = key == lowest
        ties = tl.sum(tied.to(tl.float32), axis=1)
        split = by_p & (ties > 1)
        if any_row(split):
            # target less what comes before the ties, in ties: so many more fit
            flip = tl.where(hf, -1, 0)[:, None]  # ~ reverses the order of integers
            earlier = (key ^ flip) > (lowest ^ flip)
            before = tl.sum(tl.where(earlier, weights(key, top), 0.0), axis=1)
            one = tl.exp(key_value(lo + 1) - top)
            fit = tl.floor((target - before) / tl.maximum(one, 1e-37))
            fitting = tl.where(hf, ties - fit, fit + 1)
            fitting = tl.minimum(tl.maximum(fitting, 1.0), ties)
            # the same search over indices
            order = tl.where(tied, index * (-1 - 2 * flip), LOWEST_KEY)
            before_all = tl.where(hf, lo * 0 - 1, lo * 0 - FARTHEST)
            hi_index = tl.where(split, tl.max(order, axis=1), before_all + 1)
            edge, _ = search(order, top, before_all, hi_index, ties, fitting - 1, none, none, 0.0, False, T)
            first = tl.where(split & hf, edge + 1, first)
            last = tl.where(split & (hf == 0), -edge - 1, last)
    return lo, first, last
