"""Philox4x32-10 (Salmon et al., SC'11): the words, and the exponential variates, of `ops/noise.py`.

Row j of a draw is lane j % 4 of the block at counter (j // 4, step, stream, chunk) under a 64-bit key, the
seed. A 32-bit word x becomes u = (x // 512 + 1/2) / 2^23, exact in fp32, and q = -log(u). Words and u are those
of `ops.noise` bit for bit; q may differ from torch's by the last bits of the logarithm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.target import COMPILE, cdiv, on_its_device, power_of_2

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)

SEED, STEP, STREAM, CHUNK = (tl.constexpr(column) for column in range(4))
"""Columns of a `places` tensor (rows, 4) int64; a seed of 2^63 or more is held as its two's complement."""

BLOCK = 1024
"""Variates a program of `exponential` makes."""


@triton.jit
def load_place(places, row, row_stride, inside):
    """Key and counter words (key0, key1, step, stream, chunk) of rows, uint32."""
    places += row * row_stride
    seed = tl.load(places + SEED, inside, 0)
    step = tl.load(places + STEP, inside, 0)
    stream = tl.load(places + STREAM, inside, 0)
    chunk = tl.load(places + CHUNK, inside, 0)
    return (
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
        step.to(tl.uint32), stream.to(tl.uint32), chunk.to(tl.uint32),
    )  # fmt: skip


@triton.jit
def philox_words(block, step, stream, chunk, key0, key1):
    """Four uint32 words of the counter (block, step, stream, chunk); arguments uint32 of shapes that
    broadcast."""
    zero = block * 0
    c0, c1, c2, c3 = block, step + zero, stream + zero, chunk + zero
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, zero + MULTIPLIER_0), c0 * MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, zero + MULTIPLIER_1), c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += WEYL_0
        key1 += WEYL_1
    return c0, c1, c2, c3


@triton.jit
def exponential_of(word):
    """-log of the uniform variate a word stands for."""
    return -tl.log(((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0))


@triton.jit
def exponential_run(first, step, stream, chunk, key0, key1, COUNT: tl.constexpr):
    """Variates of rows [first, first + COUNT), first a multiple of 4; place words (ROWS, 1) -> (ROWS,
    COUNT)."""
    block = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)[None, :] + step * 0
    w0, w1, w2, w3 = philox_words(block, step, stream, chunk, key0, key1)
    return exponential_of(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def exponential_at(at, step, stream, chunk, key0, key1):
    """Variates of rows `at` (ROWS, COUNT) int32 in any order, at four times the work of a run."""
    lane = at % 4
    w0, w1, w2, w3 = philox_words((at // 4).to(tl.uint32), step, stream, chunk, key0, key1)
    low = tl.where(lane == 0, w0, w1)
    return exponential_of(tl.where(lane < 2, low, tl.where(lane == 2, w2, w3)))


@triton.jit(do_not_specialize=["rows"])
def _exponential_kernel(
    places, out, place_stride, out_stride, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key0, key1, step, stream, chunk = load_place(places, row, place_stride, row < rows)
    first = tl.program_id(1) * BLOCK
    q = exponential_run(
        first, step[:, None], stream[:, None], chunk[:, None], key0[:, None], key1[:, None], BLOCK
    )
    column = first + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(out + row[:, None] * out_stride + column[None, :], q, inside)


@on_its_device
def exponential(places: Tensor, width: int, rows_a_program: int = 1) -> Tensor:
    """Exp(1) variates (rows, width) fp32 of the places (rows, 4) int64."""
    assert places.dtype == torch.int64 and places.dim() == 2 and places.shape[1] == 4 and places.stride(1) == 1
    rows = len(places)
    out = torch.empty(rows, width, dtype=torch.float32, device=places.device)
    if rows and width:
        block = max(4, min(BLOCK, power_of_2(width)))
        _exponential_kernel[(cdiv(rows, rows_a_program), cdiv(width, block))](
            places, out, places.stride(0), out.stride(0), rows, width,
            ROWS=rows_a_program, BLOCK=block, num_warps=max(1, block // 256), **COMPILE,
        )  # fmt: skip
    return out
