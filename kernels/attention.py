"""Flash attention, forward: out = softmax(scale * q k^T) v, one block of queries a program.

query (batch, heads, time, head_dim), key and value (batch, heads, keys, head_dim), each with its own strides
and a unit last one, so that views of a packed projection are read where they lie. The softmax is online
(Milakov & Gimelshein, 2018; blocked as in Dao, 2023) in base 2: scores, their maxima and sums and the output
are float32, weights are rounded to the inputs' dtype for the second product. float32 is multiplied as float32,
or as TF32 where torch is told to (`target.precision`). Keys from a sequence's length on, and those its mask
leaves out, are not read; nor is a block of keys that no query of the program may see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.target import COMPILE, Target, cdiv, on_its_device, precision, registers, target_of
from bark_fast.kernels.tf32 import for_product

HEAD_DIMS = (32, 64, 128)
LOG2_E: float = 1.4426950408889634


@dataclass(frozen=True)
class Blocks:
    """An entry of the launch table: queries of a program, keys of a step, warps, steps in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def blocks(target: Target, head_dim: int, dtype: torch.dtype, time: int, pairs: int, masked: bool) -> Blocks:
    """The launch table. pairs: batch times heads. masked: every step takes a mask, which costs registers."""
    if dtype == torch.float32:
        # no tensor cores: both operands of a product pass through registers, and wider blocks spill
        return Blocks(32, 32, 4, 2) if head_dim < 128 else Blocks(32, 16, 4, 2)
    # At head_dim 64 a score costs the exponential unit of a Hopper as many cycles as its tensor cores, and more
    # on a Blackwell: several programs should share a processor, each in another phase, so no block is larger
    # than lets two be resident. Blocks of 128 queries read keys half as often, and are taken once they alone
    # give every processor two programs; below that (one utterance: 12 or 16 heads of 1,024 queries) blocks of
    # 64 reach more processors.
    few = masked or pairs * cdiv(time, 128) < 2 * target.processors
    if target.mma_sync:
        warps = max(4, head_dim // 16)  # 32 queries each where they fit: mma.sync reads operands warp by warp
        return Blocks(64, 64 if head_dim < 128 else 32, 4, 3) if few else Blocks(128, 32, warps, 3)
    if target.arch < 100:
        # two steps of K and V wait in shared memory; AMD's chips, whose numbers are such ones, have 64 KB
        stages = 3 if 4 * head_dim * 64 * 2 < target.shared_memory else 2
        return Blocks(64, 64, 4, stages) if few else Blocks(128, 64, 8, stages)
    # tcgen05 leaves a row of scores with one thread of four warps: no reduction between threads
    return Blocks(64, 64, 4, 2) if few else Blocks(128, 64, 4 if head_dim < 128 else 8, 2)


@triton.jit
def wide(x):
    """x in 64 bits, also where the interpreter has it as Python's int."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def join_values(weights, keep, v, total, acc, PRECISION: tl.constexpr):
    """Rescale the running sum and output by `keep` and add a step's weights and weighted values."""
    total = total * keep + tl.sum(weights, 1)
    weights, v = for_product(weights.to(v.dtype), PRECISION), for_product(v, PRECISION)
    acc = tl.dot(weights, v, acc * keep[:, None], input_precision=PRECISION)
    return total, acc


@triton.jit
def open_step(q, k, v, scale, maximum, total, acc, PRECISION: tl.constexpr):
    """A step all of whose keys every query sees. q: `for_product`. scale: of scores, with log2(e), positive."""
    scores = tl.dot(q, tl.trans(for_product(k, PRECISION)), input_precision=PRECISION)
    highest = tl.maximum(maximum, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest[:, None])  # one fused multiply-add before the exponential
    total, acc = join_values(weights, tl.exp2(maximum - highest), v, total, acc, PRECISION)
    return highest, total, acc


@triton.jit
def masked_step(q, k, v, seen, scale, maximum, total, acc, PRECISION: tl.constexpr):
    """A step of which each query sees the keys in `seen`, perhaps none."""
    scores = tl.dot(q, tl.trans(for_product(k, PRECISION)), input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # no key so far: exp2(-inf - 0) is 0, not NaN
    weights = tl.exp2(scores - base[:, None])
    total, acc = join_values(weights, tl.exp2(maximum - base), v, total, acc, PRECISION)
    return highest, total, acc


@triton.jit
def open_keys(
    key, value, k_time, v_time, k_tile, v_tile, end, q, scale, maximum, total, acc,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The steps of keys [0, end), all of which every query sees; end a multiple of BLOCK_N."""
    for start in range(0, end, BLOCK_N):
        k = tl.load(key + wide(start) * k_time + k_tile)
        v = tl.load(value + wide(start) * v_time + v_tile)
        maximum, total, acc = open_step(q, k, v, scale, maximum, total, acc, PRECISION)
    return maximum, total, acc


@triton.jit
def masked_keys(
    key, value, k_time, v_time, k_tile, v_tile, mask, mask_key, begin, end, length, rows, ahead, q, scale,
    maximum, total, acc,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The steps of keys [begin, end) before `length`; a query sees those below its row plus `ahead`."""
    columns = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        present = start + columns < length
        if HAS_MASK:
            present &= tl.load(mask + (start + columns) * mask_key, present, 0) != 0
        k = tl.load(key + wide(start) * k_time + k_tile, present[:, None], 0.0)
        v = tl.load(value + wide(start) * v_time + v_tile, present[:, None], 0.0)
        seen = present[None, :]
        if CAUSAL:
            seen = seen & (start + columns[None, :] < rows[:, None] + ahead)
        maximum, total, acc = masked_step(q, k, v, seen, scale, maximum, total, acc, PRECISION)
    return maximum, total, acc


@triton.jit
def normalized(total, acc):
    """acc / total; zero for a query that saw no key."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["time", "keys", "heads", "turn"])
def _attention_kernel(
    query, key, value, out, key_mask, lengths,
    q_batch, q_head, q_time, k_batch, k_head, k_time, v_batch, v_head, v_time, o_batch, o_head, o_time,
    mask_batch, mask_key, length_stride,
    heads, time, keys, turn, scale,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    WGMMA: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(time, BLOCK_M)
    if CAUSAL:
        # long blocks first; from `turn` on short ones first, which join the long ones on a processor
        pairs = tl.num_programs(0) // blocks_m
        block, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
        block = tl.where(block < turn, blocks_m - 1 - block, block - turn)
    else:
        block, pair = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    query += batch * q_batch + head * q_head
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head
    out += batch * o_batch + head * o_head

    length = keys
    if HAS_LENGTHS:
        length = tl.minimum(keys, tl.maximum(tl.load(lengths + batch * length_stride).to(tl.int32), 0))
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    limit, every, ahead = length, length, 0  # keys that some query sees, and that every query sees
    if CAUSAL:
        ahead = keys - time + 1
        limit = tl.minimum(length, tl.minimum((block + 1) * BLOCK_M, time) - 1 + ahead)
        every = tl.minimum(length, block * BLOCK_M + ahead)
    if WGMMA:
        every, limit = tl.maximum(every - 1, 0), tl.maximum(limit, 1)
    every = 0 if HAS_MASK else every // BLOCK_N * BLOCK_N

    inside = (rows < time)[:, None]
    q = tl.load(query + rows.to(tl.int64)[:, None] * q_time + dims[None, :], inside, 0.0)
    q = for_product(q, PRECISION)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    k_tile = columns[:, None] * k_time + dims[None, :]
    v_tile = columns[:, None] * v_time + dims[None, :]
    mask = key_mask + batch * mask_batch
    if not WGMMA:
        maximum, total, acc = open_keys(
            key, value, k_time, v_time, k_tile, v_tile, every, q, scale, maximum, total, acc, BLOCK_N, PRECISION
        )
    maximum, total, acc = masked_keys(
        key, value, k_time, v_time, k_tile, v_tile, mask, mask_key, every, limit, length, rows, ahead, q, scale,
        maximum, total, acc, CAUSAL, HAS_MASK, BLOCK_N, PRECISION,
    )  # fmt: skip
    if WGMMA:
        maximum, total, acc = open_keys(
            key, value, k_time, v_time, k_tile, v_tile, every, q, scale, maximum, total, acc, BLOCK_N, PRECISION
        )
    target = out + rows.to(tl.int64)[:, None] * o_time + dims[None, :]
    tl.store(target, normalized(total, acc).to(out.dtype.element_ty), inside)


@on_its_device
def attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, key_mask: Tensor | None, lengths: Tensor | None,
    scale: float, out: Tensor,
) -> None:  # fmt: skip
    """Attention of all queries, written to `out`, as in `ops.attention`."""
    batch, heads, time, head_dim = query.shape
    keys = key.shape[2]
    assert key.shape == value.shape == (batch, heads, keys, head_dim) and out.shape == query.shape
    assert query.dtype == key.dtype == value.dtype == out.dtype and head_dim in HEAD_DIMS and scale > 0
    assert query.stride(3) == key.stride(3) == value.stride(3) == out.stride(3) == 1
    assert not causal or keys >= time
    if not query.numel():
        return
    pairs = batch * heads
    target = target_of(query.device)
    entry = blocks(target, head_dim, query.dtype, time, pairs, key_mask is not None)
    blocks_m = cdiv(time, entry.queries)
    # A causal grid that does not fill the GPU twice over is resident at once: the second program a processor
    # gets should be as short as its first is long. A larger grid evens out if long programs come first.
    fits = pairs * blocks_m <= 2 * target.processors
    turn = min(blocks_m, max(1, target.processors // pairs)) if fits else blocks_m
    multiplied = precision(query.dtype)
    # not told so, ptxas spills in these to fit one program more onto a processor (SASS of triton 3.9)
    roomy = (
        (head_dim == 128 and query.dtype == torch.float32) or multiplied == "tf32"
        or (head_dim == 32 and key_mask is not None)
    )  # fmt: skip
    mask, ends = query if key_mask is None else key_mask, query if lengths is None else lengths
    _attention_kernel[(blocks_m * pairs,)](
        query, key, value, out, mask, ends,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        mask.stride(0), mask.stride(1), ends.stride(0),
        heads, time, keys, turn, scale * LOG2_E,
        CAUSAL=causal, HAS_MASK=key_mask is not None, HAS_LENGTHS=lengths is not None,
        HEAD_DIM=head_dim, BLOCK_M=entry.queries, BLOCK_N=entry.keys, PRECISION=multiplied,
        # Hopper's tensor cores run beside what follows, unless ptxas sees a loop before them that may not run
        # at all: then it waits for each (C7515). So masked keys come first, one block of them at least.
        WGMMA=90 <= target.arch < 100,
        num_warps=entry.warps, num_stages=entry.stages, **(registers(255) if roomy else {}), **COMPILE,
    )  # fmt: skip
