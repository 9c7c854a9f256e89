"""From logits to a token in one launch, every row under a rule of its own, in either dialect.

Per row: the window of its step, NaN check, EOS rule, top-k, top-p, temperature, argmax(p / q), in the order of
`ops/sampling.py`. Logits fp32, fp16 or bf16, (rows, width) with a row stride; everything is computed in fp32. q
is given, or drawn from Philox (`philox.py`). Rules and places lie in device memory (`rule_layout.py`), so a
captured graph serves any mix of sequences. Whatever rules and places hold, nothing outside the tensors is
touched.

A row wider than `CHUNK` with a filter is narrowed to at most CHUNK candidates by bisection over registers,
these are written to scratch, and all else happens on them; a filter that keeps more works on the whole row,
slower.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.philox import STEP, exponential_at, exponential_run, load_place
from bark_fast.kernels.selection import (
    LAST_INDEX,
    LOWEST_KEY,
    any_row,
    cut,
    order_key,
    search,
    weights,
)  # fmt: skip
from bark_fast.kernels.target import COMPILE, cdiv, on_its_device, power_of_2
from bark_fast.rule_layout import RuleFloat, RuleInt

DIALECT, GREEDY, WINDOWS, LOW0, HIGH0, LOW1, HIGH1, EOS, TOP_K = (tl.constexpr(int(c)) for c in RuleInt)
TEMPERATURE, TOP_P, MIN_EOS_P = (tl.constexpr(int(c)) for c in RuleFloat)

NO_NOISE, GIVEN, PHILOX = (tl.constexpr(kind) for kind in range(3))
INVALID = tl.constexpr(-1)

CHUNK = 1024
"""Candidates in hand at once, columns of scratch a row."""
WIDEST = 32_768
"""Columns a window may have: the whole window lies in the registers of one block."""


@triton.jit
def load_window(rules, step, row, rule_stride, inside):
    """Window [low, high) of rows at `step` (int64), from their rules."""
    rule = rules + row * rule_stride
    windows = tl.load(rule + WINDOWS, inside, 1)
    second = (windows > 1) & (step % 2 != 0)
    low = tl.load(rule + tl.where(second, LOW1, LOW0), inside, 0)
    high = tl.load(rule + tl.where(second, HIGH1, HIGH0), inside, 0)
    return low, high


@triton.jit
def _divide(x, divisor, inverse):
    """x / divisor to nearest (Markstein), inverse = 1 / divisor to nearest: a division each would be a call."""
    quotient = x * inverse
    corrected = tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)
    return tl.where(tl.abs(quotient) < 1e37, corrected, quotient)


@triton.jit
def _scores(logits, at, inside, temperature, inverse):
    """Logits in fp32, and divided by the temperature."""
    x = tl.load(logits + at, inside, float("-inf")).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 must have the key of 0.0
    return x, _divide(x, temperature, inverse)


@triton.jit(do_not_specialize=["rows"])
def _sample_kernel(
    logits, noise, rules, numbers, places, tokens, flag, scratch,
    rows, width, logits_low, logits_stride, noise_stride, rule_stride, number_stride, place_stride,
    NOISE: tl.constexpr, FILTERS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SCAN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    step = tl.load(places + row * place_stride + STEP, live, 0)
    low, high = load_window(rules, step, row, rule_stride, live)
    # a window that is not within the logits, or wider than a block, holds nothing
    fits = live & (low >= logits_low) & (low <= high) & (high <= logits_low + width)
    count = tl.where(fits, high - low, 0)
    count = tl.where(count <= BLOCK, count, 0)
    rule = rules + row * rule_stride
    hf = tl.load(rule + DIALECT, live, 0) == 1
    greedy = tl.load(rule + GREEDY, live, 1) != 0
    eos = tl.load(rule + EOS, live, -1)
    has_eos = (count > 0) & (eos >= low) & (eos < high)
    number = numbers + row * number_stride
    temperature = tl.where(greedy, 1.0, tl.load(number + TEMPERATURE, live, 1.0))
    eos_rule = has_eos & (tl.load(number + MIN_EOS_P, live, float("inf")) < float("inf"))
    window = logits + (row * logits_stride + tl.where(count > 0, low - logits_low, 0))[:, None]
    inverse = tl.div_rn(1.0, temperature)
    temperature2, inverse2 = temperature[:, None], inverse[:, None]

    column = tl.arange(0, BLOCK)[None, :]
    within = column < count[:, None]
    x = tl.load(window + column, within, float("-inf")).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    highest = tl.max(tl.where(x != x, float("inf"), x), axis=1)
    valid = (highest < float("inf")) & (highest > float("-inf"))
    highest = tl.where(valid, highest, 0.0)
    top = _divide(highest, temperature, inverse)

    top_k = row.to(tl.int32) * 0
    top_p = temperature * 0.0 - 1.0
    if FILTERS:
        filtering = valid & (greedy == 0)
        top_k = tl.where(filtering, tl.minimum(tl.load(rule + TOP_K, live, 0), count), 0)
        top_p = tl.where(filtering, tl.load(number + TOP_P, live, -1.0), -1.0)
    filtered = (top_k > 0) | (top_p >= 0)

    # weight of the untempered row
    mass = temperature * 0.0 + 1.0
    if any_row(valid & ((hf & (greedy | eos_rule)) | ((hf == 0) & (top_p >= 0)))):
        mass = tl.sum(tl.exp(x - highest[:, None]), axis=1)  # columns outside hold -inf
    first = row.to(tl.int32) * 0
    lo = first + LOWEST_KEY
    last = first + LAST_INDEX
    remaining = count
    gathered = tl.max(count, axis=0) < 0
    if FILTERS:
        if any_row(filtered):
            if any_row(hf):
                x = tl.where(hf[:, None], _divide(x, temperature2, inverse2), x)
            sort_top = tl.where(hf, top, highest)
            key = tl.where(within & valid[:, None], order_key(x), LOWEST_KEY)
            total = count.to(tl.float32)
            dropped = total * 0.0
            if BLOCK > CHUNK:
                # above lo: everything that may be kept
                by_mass = (top_k <= 0) | ((top_k > CHUNK) & (top_p >= 0) & (hf == 0))
                all_mass = mass
                if any_row(by_mass & hf & filtered):
                    all_mass = tl.where(hf, tl.sum(weights(key, sort_top), axis=1), mass)
                target = tl.where(by_mass, top_p * all_mass, top_k.to(tl.float32) - 1)
                hi = tl.where(filtered, tl.max(key, axis=1), lo + 1)
                by_mass = by_mass & filtered
                lo, total = search(key, sort_top, lo, hi, total, target, by_mass, by_mass & hf, CHUNK, True, 1)
                if any_row(by_mass & hf):
                    left = tl.where(key > lo[:, None], LOWEST_KEY, key)
                    dropped = tl.where(by_mass & hf, tl.sum(weights(left, sort_top), axis=1), 0.0)
                gathered = any_row(filtered & (total > CHUNK)) == 0
                gathered = gathered & (any_row((filtered == 0) & (count > CHUNK)) == 0)
            if gathered:
                shelf = scratch + (row * CHUNK)[:, None]
                remaining = count * 0
                # read again, a part at a time: a scan of all of it would not fit into registers
                start = 0
                while start < tl.max(count, axis=0):
                    at = start + tl.arange(0, SCAN)[None, :] + first[:, None]
                    present = (at < count[:, None]) & valid[:, None]
                    plain, tempered = _scores(window, at, present, temperature2, inverse2)
                    keep = present & (order_key(tl.where(hf[:, None], tempered, plain)) > lo[:, None])
                    slot = remaining[:, None] + tl.cumsum(keep.to(tl.int32), axis=1) - 1
                    tl.store(shelf + slot, at, keep & (slot < CHUNK))
                    remaining += tl.sum(keep.to(tl.int32), axis=1)
                    start += SCAN
                tl.debug_barrier()  # other threads of this program read what these wrote
                place = tl.arange(0, CHUNK)[None, :]
                present = place < remaining[:, None]
                at = tl.load(shelf + place, present, 0)
                plain, tempered = _scores(window, at, present, temperature2, inverse2)
                few = tl.where(hf[:, None], tempered, plain)
                few_key = tl.where(present, order_key(few), LOWEST_KEY)
                lo, first, last = cut(few_key, at, sort_top, lo, total, top_k, top_p, mass, dropped, hf, T)
            else:
                index = column + first[:, None]
                lo, first, last = cut(key, index, sort_top, lo, total, top_k, top_p, mass, dropped, hf, 1)

    best = tl.full([ROWS, CHUNK], float("-inf"), tl.float32)
    best_at = tl.full([ROWS, CHUNK], LAST_INDEX, tl.int32)
    drawn_mass = tl.zeros([ROWS, CHUNK], tl.float32)
    log_mass = tl.log(mass)
    lo2, first2, last2 = lo[:, None], first[:, None], last[:, None]
    key0, key1, step32, stream, chunk = load_place(places, row, place_stride, live)
    words = (step32[:, None], stream[:, None], chunk[:, None], key0[:, None], key1[:, None])
    start = 0
    while start < tl.max(remaining, axis=0):
        at = start + tl.arange(0, CHUNK)[None, :] + row[:, None].to(tl.int32) * 0
        present = at < remaining[:, None]
        if gathered:
            at = tl.load(scratch + (row * CHUNK)[:, None] + at, present, 0)
        plain, tempered = _scores(window, at, present, temperature2, inverse2)
        kept = present
        if FILTERS:
            key = order_key(tl.where(hf[:, None], tempered, plain))
            kept = present & (key > lo2) & ((key != lo2 + 1) | ((at >= first2) & (at <= last2)))
        weight = tl.where(kept, tl.exp(tempered - top[:, None]), 0.0)
        drawn_mass += weight
        # equal log-probabilities tie in Hugging Face's greedy search, whatever the logits
        score = tl.where(hf[:, None], (plain - highest[:, None]) - log_mass[:, None], plain)
        if NOISE != NO_NOISE:
            if NOISE == GIVEN:
                q = tl.load(noise + row[:, None] * noise_stride + at, present, 1.0)
            elif gathered:
                q = exponential_at(at, words[0], words[1], words[2], words[3], words[4])
            else:
                q = exponential_run(start, words[0], words[1], words[2], words[3], words[4], CHUNK)
            score = tl.where(greedy[:, None], score, weight / q)
        better = kept & (score > best)
        best = tl.where(better, score, best)
        best_at = tl.where(better, at, best_at)
        start += CHUNK
    winner = tl.max(best, axis=1)
    token = tl.min(tl.where(best == winner[:, None], best_at, LAST_INDEX), axis=1)
    valid = valid & (token != LAST_INDEX)
    if NOISE == NO_NOISE:
        valid = valid & greedy

    min_eos_p = tl.load(number + MIN_EOS_P, live, float("inf"))
    eos_score = tl.load(window + (eos - low)[:, None], has_eos[:, None], float("-inf")).to(tl.float32)
    eos_score = tl.max(eos_score, axis=1)
    forced = hf & eos_rule & (tl.exp(eos_score - highest) / mass > min_eos_p)
    reaching = eos_rule & (hf == 0) & (greedy == 0)
    if any_row(reaching):
        likely = tl.exp(_divide(eos_score, temperature, inverse) - top) / tl.sum(drawn_mass, axis=1)
        reaching = reaching & (likely >= min_eos_p)
        if FILTERS:
            key = order_key(tl.where(eos_score == 0.0, 0.0, eos_score))
            here = eos - low
            reaching = reaching & (key > lo) & ((key != lo + 1) | ((here >= first) & (here <= last)))
        forced = forced | reaching
    token = tl.where(forced, eos, token + low)
    tl.store(tokens + row, tl.where(valid, token, INVALID).to(tl.int64), live)
    tl.store(flag + row * 0, row.to(tl.int32) * 0 + 1, live & (valid == 0))


def _launch(window: int, rows_a_program: int, chunk: int, filters: bool) -> tuple[int, int, int, int]:
    """Columns of the window tile and of the candidates' tile, thresholds a round, warps."""
    block = max(16, power_of_2(window))
    # with all columns kept, two turns of fewer registers let more programs onto a processor
    chunk = min(block, chunk) if filters else min(max(16, block // 2), chunk)
    return (
        block,
        chunk,
        8 if chunk >= 256 else 4,
        max(1, min(16 if filters else 8, rows_a_program * block // 128)),
    )


@on_its_device
def sample(
    logits: Tensor, noise: Tensor | None, rules: Tensor, numbers: Tensor, places: Tensor | None, window: int,
    logits_low: int = 0, filters: bool = True, tokens: Tensor | None = None, flag: Tensor | None = None,
    scratch: Tensor | None = None, rows_a_program: int = 1, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens (rows,) int64, rows of the head; -1 for an invalid row. flag (1,) int32 is set to 1 if any is.

    logits: (rows, width), column c is row logits_low + c of the head. noise: (rows, window) Exp(1), column c
    for row low + c; None draws from Philox at `places` (rows, 4) int64, and without places all rows must be
    greedy. rules, numbers: (rows, 9) int32 and (rows, 3) fp32, see `rule_layout`; row stride 0 shares one rule.
    window: the widest window of the rules. filters: False skips top-k and top-p, which no rule may then ask
    for. scratch: (rows, chunk) int32, used where filters are on and the window is wider than a chunk.
    """
    assert logits.dim() == 2 and logits.stride(1) == 1 and 0 < window <= WIDEST
    assert 0 <= logits_low <= 2**30
    assert rules.dtype == torch.int32 and numbers.dtype == torch.float32
    assert rules.shape == (len(logits), len(RuleInt)) and numbers.shape == (len(logits), len(RuleFloat))
    assert rules.stride(1) == numbers.stride(1) == 1
    rows = len(logits)
    if noise is not None:
        assert noise.dtype == torch.float32 and noise.stride(1) == 1
        assert len(noise) == rows and noise.shape[1] >= min(window, logits.shape[1])
    kind = NO_NOISE if places is None else PHILOX
    if noise is not None:
        kind = GIVEN
    if places is None:
        places = torch.zeros(1, 4, dtype=torch.int64, device=logits.device).expand(rows, 4)
    assert places.dtype == torch.int64 and places.shape == (rows, 4) and places.stride(1) == 1
    block, chunk, thresholds, warps = _launch(window, rows_a_program, chunk, filters)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device) if tokens is None else tokens
    flag = torch.zeros(1, dtype=torch.int32, device=logits.device) if flag is None else flag
    if filters and block > chunk and scratch is None:
        scratch = torch.empty(rows, chunk, dtype=torch.int32, device=logits.device)
    if not filters or block <= chunk:
        scratch = None
    assert scratch is None or (scratch.shape == (rows, chunk) and scratch.is_contiguous())
    assert tokens.is_contiguous() and tokens.dtype == torch.int64 and len(tokens) == rows
    if rows:
        _sample_kernel[(cdiv(rows, rows_a_program),)](
            logits, logits if noise is None else noise, rules, numbers, places, tokens, flag,
            flag if scratch is None else scratch,
            rows, logits.shape[1], logits_low, logits.stride(0), 0 if noise is None else noise.stride(0),
            rules.stride(0), numbers.stride(0), places.stride(0),
            NOISE=kind.value, FILTERS=filters, ROWS=rows_a_program, BLOCK=block, CHUNK=chunk,
            SCAN=max(chunk, block // 2), T=thresholds, num_warps=warps, **COMPILE,
        )  # fmt: skip
    return tokens, flag
