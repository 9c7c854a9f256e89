"""LayerNorm, the head's rows of one window, and a draw by temperature, in one launch: logits never reach
memory.

h = LayerNorm(x) * weight (+ bias), eps 1e-5, in fp32 and rounded to the head's dtype; logit c = head[low + c] .
h, accumulated and kept in fp32; then what `sampling.py` does without top-k and top-p. For up to 16 rows, which
share the window of row 0's step (a row of another window is invalid). A program takes a tile of the window for
all rows, reading each weight once; it leaves highest logit, weight, best candidate and EOS logit of its tile,
and the last program to arrive joins the tiles in their order and sets the counter back to zero.

Hugging Face's greedy search takes the first of the highest logits here, where `ops.sampling` rounds them as
log-probabilities first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.philox import STEP, exponential_run, load_place
from bark_fast.kernels.sampling import GIVEN, NO_NOISE, PHILOX, load_window
from bark_fast.kernels.target import COMPILE, cdiv, on_its_device
from bark_fast.rule_layout import RuleFloat, RuleInt

DIALECT, GREEDY, EOS = (tl.constexpr(int(c)) for c in (RuleInt.DIALECT, RuleInt.GREEDY, RuleInt.EOS))
TEMPERATURE, MIN_EOS_P = (tl.constexpr(int(c)) for c in (RuleFloat.TEMPERATURE, RuleFloat.MIN_EOS_P))
MAX_ROWS = 16
EPS = tl.constexpr(1e-5)
HIGHEST, MASS, BEST, EOS_LOGIT = (tl.constexpr(column) for column in range(4))
PARTS = tl.constexpr(5)
"""Numbers a tile leaves a row: the four above, and the column of the best."""
NOWHERE = tl.constexpr(2**31 - 1)
TILE_K = {1: 256, 16: 64}
"""Columns of the head read at once for one row, and for more."""
TILE_X = {1: 1024, 16: 256}
"""Columns of x read at once for its moments: of all 16 rows, more would not fit into registers."""
JOIN = {1: 256, 16: 64}
"""Tiles the last program joins at once."""


@triton.jit
def _moments(x, row, live, x_stride, width, ROWS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr):
    """Mean and 1 / standard deviation of rows, fp32."""
    column = tl.arange(0, TILE)[None, :]
    rows = x + row[:, None] * x_stride + column
    total = tl.zeros([ROWS, TILE], tl.float32)
    for step in range(STEPS):
        inside = live[:, None] & (step * TILE + column < width)
        total += tl.load(rows + step * TILE, inside, 0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / width
    total = tl.zeros([ROWS, TILE], tl.float32)
    for step in range(STEPS):
        inside = live[:, None] & (step * TILE + column < width)
        values = tl.load(rows + step * TILE, inside, 0.0).to(tl.float32)
        centred = tl.where(inside, values - mean[:, None], 0.0)
        total += centred * centred
    return mean, 1.0 / tl.sqrt(tl.sum(total, axis=1) / width + EPS)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _head_sample_kernel(
    x, norm_weight, norm_bias, head, noise, rules, numbers, places, parts, counter, tokens, flag,
    rows, width, vocabulary, tiles,
    x_stride, head_stride, noise_stride, rule_stride, number_stride, place_stride,
    NOISE: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr, TILE_K: tl.constexpr, STEPS_X: tl.constexpr, TILE_X: tl.constexpr,
    JOIN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    step = tl.load(places + row * place_stride + STEP, live, 0)
    lows, highs = load_window(rules, step, row, rule_stride, live)
    low = tl.sum(tl.where(row == 0, lows, 0), axis=0)
    high = tl.sum(tl.where(row == 0, highs, 0), axis=0)
    fits = (low >= 0) & (low <= high) & (high <= vocabulary)
    count = tl.where(fits, high - low, 0)
    count = tl.where(count <= tiles * TILE, count, 0)
    shared = live & (lows == low) & (highs == high)
    rule = rules + row * rule_stride
    hf = tl.load(rule + DIALECT, live, 0) == 1
    greedy = tl.load(rule + GREEDY, live, 1) != 0
    eos = tl.load(rule + EOS, live, -1)
    temperature = tl.where(greedy, 1.0, tl.load(numbers + row * number_stride + TEMPERATURE, live, 1.0))
    key0, key1, step32, stream, chunk = load_place(places, row, place_stride, live)

    column = tile * TILE + tl.arange(0, TILE)
    present = column < count
    mean, scale = _moments(x, row, live, x_stride, width, ROWS, STEPS_X, TILE_X)
    heads = head + (tl.where(count > 0, low, 0) + column).to(tl.int64)[:, None] * head_stride
    if ROWS == 1:
        total = tl.zeros([TILE, TILE_K], tl.float32)
    else:
        total = tl.zeros([ROWS, TILE], tl.float32)
    for step_k in range(STEPS):
        at = step_k * TILE_K + tl.arange(0, TILE_K)
        within = at < width
        weight = tl.load(heads + at[None, :], present[:, None] & within[None, :], 0.0)
        values = tl.load(x + row[:, None] * x_stride + at[None, :], live[:, None] & within[None, :], 0.0)
        h = (values.to(tl.float32) - mean[:, None]) * scale[:, None]
        h *= tl.load(norm_weight + at, within, 0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            h += tl.load(norm_bias + at, within, 0.0).to(tl.float32)[None, :]
        h = h.to(head.dtype.element_ty)
        if ROWS == 1:
            total += weight.to(tl.float32) * h.to(tl.float32)
        else:
            total = tl.dot(h, tl.trans(weight), total, input_precision="ieee")
    if ROWS == 1:
        logits = tl.sum(total, axis=1)[None, :]
    else:
        logits = total

    logits = tl.where(present[None, :], logits, float("-inf"))
    highest = tl.max(tl.where(logits != logits, float("inf"), logits), axis=1)
    # a tile that is all -inf, or invalid, leaves numbers that the join ignores
    reference = tl.where(tl.abs(highest) < float("inf"), highest, 0.0)
    tempered = (logits - reference[:, None]) / temperature[:, None]
    weights = tl.where(present[None, :], tl.exp(tempered), 0.0)
    mass = tl.sum(
        tl.where(hf[:, None] & present[None, :], tl.exp(logits - reference[:, None]), weights), axis=1
    )
    score = logits
    if NOISE != NO_NOISE:
        if NOISE == GIVEN:
            at_noise = noise + row[:, None] * noise_stride + column[None, :]
            q = tl.load(at_noise, live[:, None] & present[None, :], 1.0)
        else:
            q = exponential_run(
                tile * TILE,
                step32[:, None],
                stream[:, None],
                chunk[:, None],
                key0[:, None],
                key1[:, None],
                TILE,
            )
        score = tl.where(greedy[:, None], logits, tl.where(present[None, :], weights / q, float("-inf")))
    best = tl.max(score, axis=1)
    found = (score == best[:, None]) & present[None, :]
    best_at = tl.min(tl.where(found, column[None, :], NOWHERE), axis=1)
    is_eos = present[None, :] & (low + column[None, :] == eos[:, None])
    eos_logit = tl.max(tl.where(is_eos, logits, float("-inf")), axis=1)
    mine = parts + (row * tiles + tile) * PARTS
    tl.store(mine + HIGHEST, highest, live)
    tl.store(mine + MASS, mass, live)
    tl.store(mine + BEST, best, live)
    tl.store(mine + EOS_LOGIT, eos_logit, live)
    tl.store(mine + 4, best_at.to(tl.float32, bitcast=True), live)
    tl.debug_barrier()  # every thread's stores come before the one that announces them
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == tiles - 1:
        tl.store(counter, 0)
        tl.debug_barrier()
        part = tl.arange(0, JOIN)[None, :]
        theirs = parts + (row[:, None] * tiles + part) * PARTS
        highests = tl.full([ROWS, JOIN], float("-inf"), tl.float32)
        start = 0
        while start < tiles:
            there = live[:, None] & (start + part < tiles)
            others = tl.load(theirs + start * PARTS + HIGHEST, there, float("-inf"), cache_modifier=".cg")
            highests = tl.maximum(highests, others)
            start += JOIN
        top = tl.max(highests, axis=1)
        valid = shared & (tl.abs(top) < float("inf"))
        top = tl.where(valid, top, 0.0)
        whole = tl.zeros([ROWS, JOIN], tl.float32)
        bests = tl.full([ROWS, JOIN], float("-inf"), tl.float32)
        bests_at = tl.full([ROWS, JOIN], NOWHERE, tl.int32)
        eos_logits = tl.full([ROWS, JOIN], float("-inf"), tl.float32)
        start = 0
        while start < tiles:
            there = live[:, None] & (start + part < tiles)
            here = theirs + start * PARTS
            others = tl.load(here + HIGHEST, there, float("-inf"), cache_modifier=".cg")
            masses = tl.load(here + MASS, there, 0.0, cache_modifier=".cg")
            scores = tl.load(here + BEST, there, float("-inf"), cache_modifier=".cg")
            eos_others = tl.load(here + EOS_LOGIT, there, float("-inf"), cache_modifier=".cg")
            at = tl.load(here + 4, there, 0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
            scaled = tl.exp((others - top[:, None]) / temperature[:, None])
            whole += masses * tl.where(hf[:, None], tl.exp(others - top[:, None]), scaled)
            scores = tl.where(greedy[:, None], scores, scores * scaled)
            # a tile without a finite logit has no candidate
            better = (others > float("-inf")) & (scores > bests)
            bests = tl.where(better, scores, bests)
            bests_at = tl.where(better, at, bests_at)
            eos_logits = tl.maximum(eos_logits, eos_others)
            start += JOIN
        winner = tl.max(bests, axis=1)
        token = tl.min(tl.where(bests == winner[:, None], bests_at, NOWHERE), axis=1)
        valid = valid & (token != NOWHERE)
        if NOISE == NO_NOISE:
            valid = valid & greedy
        min_eos_p = tl.load(numbers + row * number_stride + MIN_EOS_P, live, float("inf"))
        eos_top = (tl.max(eos_logits, axis=1) - top) / tl.where(hf, 1.0, temperature)
        likely = tl.exp(eos_top) / tl.sum(whole, axis=1)
        forced = tl.where(hf, likely > min_eos_p, (likely >= min_eos_p) & (greedy == 0))
        forced = forced & (eos >= low) & (eos < high) & (min_eos_p < float("inf"))
        token = tl.where(forced, eos, token + low)
        tl.store(tokens + row, tl.where(valid, token, -1).to(tl.int64), live)
        tl.store(flag + row * 0, row.to(tl.int32) * 0 + 1, live & (valid == 0))


def tiles(window: int, rows: int) -> tuple[int, int]:
    """Columns of a tile, and how many there are."""
    tile = 16 if rows == 1 else 64
    return tile, cdiv(window, tile)


def head_scratch(window: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `head_sample` writes between its programs: parts, and a counter that must be zero and is left so."""
    count = tiles(window, rows)[1]
    parts = torch.empty(rows, count, PARTS.value, dtype=torch.float32, device=device)
    return parts, torch.zeros(1, dtype=torch.int32, device=device)


@on_its_device
def head_sample(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, head: Tensor, noise: Tensor | None, rules: Tensor,
    numbers: Tensor, places: Tensor | None, window: int, tokens: Tensor | None = None,
    flag: Tensor | None = None, scratch: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens (rows,) int64 and flag (1,) int32 of hidden states x (rows, width), as `sampling.sample` returns
    them.

    head: (vocabulary, width), row stride of its own. noise: (rows, window). Everything else as for
    `sampling.sample`, rules without top-k and top-p (they are not looked at). scratch: of `head_scratch`.
    """
    rows, width = x.shape
    assert 0 < rows <= MAX_ROWS and 0 < window <= 32_768
    assert x.stride(1) == head.stride(1) == norm_weight.stride(0) == 1 and x.dtype == head.dtype
    assert head.shape[1] == len(norm_weight) == width and rules.stride(1) == numbers.stride(1) == 1
    assert rules.dtype == torch.int32 and numbers.dtype == torch.float32
    assert rules.shape == (rows, len(RuleInt)) and numbers.shape == (rows, len(RuleFloat))
    assert noise is None or (noise.stride(1) == 1 and noise.dtype == torch.float32 and noise.shape[1] >= window)
    kind = NO_NOISE if places is None else PHILOX
    if noise is not None:
        kind = GIVEN
    if places is None:
        places = torch.zeros(1, 4, dtype=torch.int64, device=x.device).expand(rows, 4)
    assert places.dtype == torch.int64 and places.shape == (rows, 4) and places.stride(1) == 1
    tokens = torch.empty(rows, dtype=torch.int64, device=x.device) if tokens is None else tokens
    flag = torch.zeros(1, dtype=torch.int32, device=x.device) if flag is None else flag
    parts, counter = head_scratch(window, rows, x.device) if scratch is None else scratch
    tile, count = tiles(window, rows)
    padded = 1 if rows == 1 else MAX_ROWS
    assert parts.shape == (rows, count, PARTS.value) and parts.is_contiguous()
    _head_sample_kernel[(count,)](
        x, norm_weight, norm_weight if norm_bias is None else norm_bias, head, x if noise is None else noise,
        rules, numbers, places, parts, counter, tokens, flag,
        rows, width, len(head), count, x.stride(0), head.stride(0), 0 if noise is None else noise.stride(0),
        rules.stride(0), numbers.stride(0), places.stride(0),
        NOISE=kind.value, HAS_BIAS=norm_bias is not None, ROWS=padded, TILE=tile,
        STEPS=cdiv(width, TILE_K[padded]), TILE_K=TILE_K[padded],
        STEPS_X=cdiv(width, TILE_X[padded]), TILE_X=TILE_X[padded], JOIN=JOIN[padded],
        num_warps=4 if padded == 1 else 8, num_stages=3, **COMPILE,
    )  # fmt: skip
    return tokens, flag
