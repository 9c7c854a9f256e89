"""Linear layers of many rows on tensor cores: act(LN(x) @ weight.T + bias) + residual.

x (rows, k), weight (n, k) as torch.nn.Linear keeps it, out (rows, n). Products accumulate in fp32; in fp32
they are true fp32 multiply-adds, or of TF32 where torch is told to (`target.precision`). A LayerNorm (up to 16
rows; more are normalised beforehand, by kernels.layer_norm) has its statistics and normalised values in fp32,
and the normalised row is rounded to the weight's dtype before the product, as torch rounds it.

Where the tiles of out are too few to fill the chip, k is split: each program leaves its partial sums in
scratch, and the last to arrive at a tile adds them in the order of the splits, so results do not depend on who
is last. It leaves the tile's counter at zero, so that a captured graph can be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.layer_norm import EPS, gelu
from bark_fast.kernels.target import COMPILE, Target, cdiv, power_of_2, precision, registers, target_of
from bark_fast.kernels.tf32 import for_product

MAX_NORM_ROWS = 16
MAX_NORM_BYTES = 512
"""Of the rows to normalise, in a thread's registers; for longer ones LayerNorm is a launch of its own."""
MAX_SPLITS = 8


@triton.jit
def _moments(x, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of BLOCK_M rows, read once and held in registers.

    Every program waits for this before its product: all loads are issued before the first is looked at, and
    threads meet once for the mean and once for the distances from it.
    """
    pieces = ()
    for step in tl.static_range(STEPS):
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        pieces += (tl.load(x + columns, WHOLE | (columns < width), 0.0),)
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for step in tl.static_range(STEPS):
        total += pieces[step].to(tl.float32)
    mean = tl.sum(total, 1) / width
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for step in tl.static_range(STEPS):
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        distance = tl.where(WHOLE | (columns < width), pieces[step].to(tl.float32) - mean[:, None], 0.0)
        total += distance * distance
    return mean, tl.rsqrt(tl.sum(total, 1) / width + EPS)


@triton.jit
def _gains(norm_weight, norm_bias, columns, k, HAS_NORM_BIAS: tl.constexpr):
    """LayerNorm's weight and bias for some columns, as they lie in memory."""
    gain = tl.load(norm_weight + columns, columns < k, 0.0)
    shift = gain
    if HAS_NORM_BIAS:
        shift = tl.load(norm_bias + columns, columns < k, 0.0)
    return gain, shift


@triton.jit
def _prefetch(weight, stride, lines, n, start, k, COUNT: tl.constexpr):
    """Ask the L2 for COUNT 128-byte lines of each row of a weight, from column `start` on; wait for nothing."""
    size: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    columns = tl.minimum(start + tl.arange(0, COUNT) * size, k - 1)
    places = weight + tl.minimum(lines, n - 1)[:, None] * stride + columns[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _finish(
    y, bias, residual, out, rows, lines, m, n, residual_stride, out_stride,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    inside = (rows < m)[:, None] & (lines < n)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + lines, lines < n, 0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    if HAS_RESIDUAL:
        y += tl.load(residual + rows[:, None] * residual_stride + lines[None, :], inside, 0.0).to(tl.float32)
    tl.store(out + rows[:, None] * out_stride + lines[None, :], y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["m"])
def _matmul_kernel(
    x, norm_weight, norm_bias, weight, bias, residual, out, partials, counters,
    m, n, k, x_stride, weight_stride, residual_stride, out_stride,
    HAS_NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # GROUP blocks of rows go through all of n together, so that what they share stays in the L2
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    rows = (first + within % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lines = (within // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + rows[:, None] * x_stride
    weight_lines = weight + lines[:, None] * weight_stride
    begin = split * (STEPS * BLOCK_K)
    if PREFETCH > 0:
        _prefetch(weight, weight_stride, lines, n, begin, k, PREFETCH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if HAS_NORM:
        # rows beyond m repeat the last: a mask of its own for every load is more than there are predicates
        there = tl.minimum(rows, m - 1)[:, None] * x_stride
        mean, rstd = _moments(x + there, k, BLOCK_M, BLOCK_K, BLOCKS, WHOLE)
        gain, shift = _gains(norm_weight, norm_bias, begin + tl.arange(0, BLOCK_K), k, HAS_NORM_BIAS)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(STEPS):
        columns = begin + step * BLOCK_K + tl.arange(0, BLOCK_K)
        here = EVEN | (columns < k)
        w = tl.load(weight_lines + columns[None, :], (lines < n)[:, None] & here[None, :], 0.0)
        values = tl.load(x_rows + columns[None, :], (rows < m)[:, None] & here[None, :], 0.0)
        if HAS_NORM:
            y = (values.to(tl.float32) - mean[:, None]) * rstd[:, None] * gain[None, :].to(tl.float32)
            if HAS_NORM_BIAS:
                y += shift[None, :].to(tl.float32)
            values = y.to(w.dtype)
            # a step ahead; the compiler fetches the weight ahead, but not elements as small as these
            gain, shift = _gains(norm_weight, norm_bias, columns + BLOCK_K, k, HAS_NORM_BIAS)
        values, w = for_product(values, PRECISION), for_product(w, PRECISION)
        sums = tl.dot(values, tl.trans(w), sums, input_precision=PRECISION)
    if SPLITS == 1:
        _finish(
            sums, bias, residual, out, rows, lines, m, n, residual_stride, out_stride,
            HAS_BIAS, HAS_RESIDUAL, GELU,
        )  # fmt: skip
    else:
        size: tl.constexpr = BLOCK_M * BLOCK_N
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mine = partials + (split * tl.num_programs(0) + tile).to(tl.int64) * size
        tl.store(mine + place, sums)
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for other in tl.static_range(SPLITS):
                theirs = partials + (other * tl.num_programs(0) + tile).to(tl.int64) * size
                total += tl.load(theirs + place, cache_modifier=".cg")
            tl.store(counters + tile, 0)
            _finish(
                total, bias, residual, out, rows, lines, m, n, residual_stride, out_stride,
                HAS_BIAS, HAS_RESIDUAL, GELU,
            )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """The block of out a program makes, columns it reads at a time, programs that k is split over.

    fused_norm: a LayerNorm is repeated in every program; otherwise it is a launch of its own.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    fused_norm: bool = True

    def partials(self, rows: int, n: int) -> tuple[int, int]:
        """Sums and counters that splitting k wants in scratch for out (rows, n)."""
        tiles = cdiv(rows, self.block_m) * cdiv(n, self.block_n)
        return (self.splits * tiles * self.block_m * self.block_n, tiles) if self.splits > 1 else (0, 0)


def normalises(x: Tensor, chosen: Tile) -> bool:
    """Whether the kernel takes a LayerNorm of these rows, where the tile asks for it."""
    held = chosen.block_m * x.shape[1] * x.element_size()
    return chosen.fused_norm and len(x) <= MAX_NORM_ROWS and held <= MAX_NORM_BYTES * 32 * chosen.warps


@cache
def tile(target: Target, dtype: torch.dtype, rows: int, n: int, k: int) -> Tile:
    """Up to 64 rows: narrow blocks of the weight, k split until each processor has work; beyond: square blocks.

    Reasoned, unmeasured: `bench_norm_linear.py --tune` tries others.
    """
    if dtype == torch.float32:  # multiply-adds out of shared memory: no tensor cores in true fp32
        most = 32 if target.small else 64
        block_m, block_n, block_k, warps, stages = (16 if rows <= 16 else most), 32, 32, 4, 3
    elif rows <= 64:
        block_m = max(16, power_of_2(rows))
        narrow = n <= 1024
        block_n, block_k = (16 if narrow and rows <= 16 else 32), (64 if narrow and k <= 1024 else 128)
        warps = block_n // 8
        stages = 4 if 6 * (block_m + block_n) * block_k <= target.shared_memory else 3  # one is in registers
    else:
        block_m, block_n, block_k, warps, stages = 128, 128, 64, 8, 3
    tiles = cdiv(rows, block_m) * cdiv(n, block_n)
    splits = 1
    most = MAX_SPLITS if rows <= 16 else 4  # partial sums grow with the rows, and soon outweigh the weight
    while splits < most and 4 * splits * tiles < 3 * target.processors and k >= 3 * block_k * splits:
        splits *= 2
    return Tile(block_m, block_n, block_k, splits, warps, stages)


def matmul(
    x: Tensor, norm: tuple[Tensor, Tensor | None] | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, gelu: bool, chosen: Tile, scratch: tuple[Tensor, Tensor] | None = None,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """act(LN(x) @ weight.T + bias) + residual: (rows, n) in x's dtype.

    scratch: fp32 sums and int32 counters, the counters zero; as large as `chosen.partials` says, or larger.
    pdl: programmatic dependent launch (compute capability 9 and later): programs start while the kernel ahead
    in the stream still runs, have the L2 fetch their part of the weight, and wait.
    """
    (rows, k), n = x.shape, len(weight)
    assert weight.shape == (n, k) and x.dtype == weight.dtype and k > 0
    assert x.stride(1) == weight.stride(1) == 1 and (norm is None or normalises(x, chosen))
    assert residual is None or (residual.shape == (rows, n) and residual.stride(1) == 1)
    norm_weight, norm_bias = norm or (None, None)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    sums, counters = chosen.partials(rows, n)
    if scratch is None:
        scratch = (
            torch.empty(sums, dtype=torch.float32, device=x.device),
            torch.zeros(counters, dtype=torch.int32, device=x.device),
        )
    assert scratch[0].dtype == torch.float32 and scratch[0].numel() >= sums and scratch[0].is_contiguous()
    assert scratch[1].dtype == torch.int32 and scratch[1].numel() >= counters and scratch[1].is_contiguous()
    tiles = cdiv(rows, chosen.block_m) * cdiv(n, chosen.block_n)
    blocks = cdiv(k, chosen.block_k)
    steps = cdiv(blocks, chosen.splits)
    span = steps * chosen.block_k
    small = target_of(x.device).small
    # neither the interpreter nor AMD's GPUs run PTX
    streaming = rows <= 64 and x.device.type != "cpu" and torch.version.hip is None
    prefetch = power_of_2(cdiv(span * x.element_size(), 128)) if streaming else 0
    _matmul_kernel[(tiles, chosen.splits)](
        x, x if norm_weight is None else norm_weight, x if norm_bias is None else norm_bias,
        weight, x if bias is None else bias, x if residual is None else residual, out, *scratch,
        rows, n, k, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        HAS_NORM=norm is not None, HAS_NORM_BIAS=norm_bias is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, GELU=gelu,
        BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k, GROUP=8, SPLITS=chosen.splits,
        STEPS=steps, BLOCKS=blocks, EVEN=span * chosen.splits == k,
        WHOLE=k % chosen.block_k == 0, PREFETCH=prefetch, PDL=pdl, PRECISION=precision(x.dtype),
        num_warps=chosen.warps, num_stages=chosen.stages,
        # a processor has one or two of these programs, so none need save registers: not told so, ptxas loads
        # half of the rows to normalise and waits before it loads the others, or spills at 56 to 96 registers
        # (SASS of triton 3.9 and 3.8)
        **(registers(255) if rows <= MAX_NORM_ROWS or small else {}),
        **({"launch_pdl": True} if pdl else {}), **COMPILE,
    )  # fmt: skip
    return out
