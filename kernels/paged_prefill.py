"""Ragged prefill over a paged cache in one launch: new rows attend, and store their keys and values as they do.

Rows of several sequences are packed; a sequence's last tokens are its rows, in order. Each program has a block
of queries of one head of one sequence. It attends over the keys already in pages, through the block table, then
over the new ones straight from the packed projection (causal), and writes its own rows' K and V to their slots:
what one program writes no other reads, so nothing is waited for. softmax(scale * q k^T) v as in
`kernels.attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.attention import LOG2_E, Blocks, masked_step, normalized, open_step, wide
from bark_fast.kernels.paged_kv import check_pages, slot_places, token_places
from bark_fast.kernels.target import COMPILE, Target, cdiv, on_its_device, precision, registers, target_of
from bark_fast.kernels.tf32 import for_product


def blocks(target: Target, head_dim: int, dtype: torch.dtype, max_queries: int, pairs: int) -> Blocks:
    """The launch table. pairs: sequences times heads."""
    if dtype == torch.float32:
        return Blocks(32, 16, 4 if head_dim < 128 else 8, 2)  # wider ones spill: operands are held in registers
    # One prompt of 257 rows and 12 heads is 60 blocks of 64 rows, which leave half of a large GPU idle: blocks
    # of 32 (two warps, whose 16 rows each keep a row's scores within a warp) then halve the longest program.
    if pairs * cdiv(max_queries, 64) < target.processors:
        return Blocks(32, 64, 2, 2) if head_dim < 128 else Blocks(32, 32, 4, 2)  # with two warps it spills
    return Blocks(64, 64 if head_dim < 128 else 32, 4, 2)


# The integers lie behind those of the rows that decode in the same step: whether they begin at a multiple of 16
# bytes changes from step to step. They are loaded one by one, so nothing is gained by knowing.
@triton.jit(
    do_not_specialize=["rows", "columns", "num_pages", "n_head"],
    do_not_specialize_on_alignment=["block_table", "lengths", "query_starts", "slots"],
)
def _prefill_kernel(
    qkv, k_pages, v_pages, block_table, lengths, query_starts, slots, out,
    qkv_row, table_stride, slot_stride, out_row,
    rows, columns, num_pages, n_head, scale,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, seq = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, stop = tl.load(query_starts + seq), tl.load(query_starts + seq + 1)
    count = tl.where((start >= 0) & (stop <= rows), stop - start, 0)
    block = tl.cdiv(count, BLOCK_M) - 1 - tl.program_id(0)  # the longest program starts first
    if block < 0:
        return
    length = tl.minimum(tl.maximum(tl.load(lengths + seq), 0), columns * PAGE_SIZE)
    cached = tl.maximum(length - count, 0)
    blind = tl.maximum(count - length, 0)  # rows before the first key; they are no keys either
    width = n_head * HEAD_DIM
    dims = tl.arange(0, HEAD_DIM)
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < count
    row = start.to(tl.int64) + index
    qkv += head * HEAD_DIM
    own = qkv + row[:, None] * qkv_row + dims[None, :]
    q = for_product(tl.load(own, inside[:, None], 0.0), PRECISION)

    home, stored = slot_places(
        tl.load(slots + row * slot_stride, inside, -1), num_pages, n_head, head, PAGE_SIZE, HEAD_DIM
    )
    home = home[:, None] + dims[None, :]
    tl.store(k_pages + home, tl.load(own + width, stored[:, None]), stored[:, None])
    tl.store(v_pages + home, tl.load(own + 2 * width, stored[:, None]), stored[:, None])

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    column = tl.arange(0, BLOCK_N)
    table = block_table + seq * table_stride
    for at in range(0, cached, BLOCK_N):
        tokens = at + column
        place, there = token_places(
            table, tokens, tokens < cached, num_pages, n_head, head, PAGE_SIZE, HEAD_DIM
        )
        lie = place[:, None] + dims[None, :]
        k = tl.load(k_pages + lie, there[:, None], 0.0)
        v = tl.load(v_pages + lie, there[:, None], 0.0)
        maximum, total, acc = masked_step(q, k, v, there[None, :], scale, maximum, total, acc, PRECISION)

    fresh = qkv + width + start.to(tl.int64) * qkv_row
    tile = column[:, None] * qkv_row + dims[None, :]
    every = blind + tl.maximum(block * BLOCK_M + 1 - blind, 0) // BLOCK_N * BLOCK_N  # keys that all rows see
    limit = tl.minimum((block + 1) * BLOCK_M, count)
    for at in range(blind, every, BLOCK_N):
        k = tl.load(fresh + wide(at) * qkv_row + tile)
        v = tl.load(fresh + width + wide(at) * qkv_row + tile)
        maximum, total, acc = open_step(q, k, v, scale, maximum, total, acc, PRECISION)
    for at in range(every, limit, BLOCK_N):
        present = (at + column < limit)[:, None]
        k = tl.load(fresh + wide(at) * qkv_row + tile, present, 0.0)
        v = tl.load(fresh + width + wide(at) * qkv_row + tile, present, 0.0)
        seen = at + column[None, :] <= index[:, None]
        maximum, total, acc = masked_step(q, k, v, seen, scale, maximum, total, acc, PRECISION)
    target = out + row[:, None] * out_row + head * HEAD_DIM + dims[None, :]
    tl.store(target, normalized(total, acc).to(out.dtype.element_ty), inside[:, None])


@on_its_device
def paged_prefill(
    qkv: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, query_starts: Tensor,
    slots: Tensor, out: Tensor, scale: float, max_queries: int,
) -> None:  # fmt: skip
    """Attention of all rows, and their K and V into pages, as in `ops.paged_prefill`."""
    check_pages(k_pages, v_pages)
    num_pages, n_head, page_size, head_dim = k_pages.shape
    seqs, columns = block_table.shape
    rows, width = len(qkv), n_head * head_dim
    assert qkv.shape == (rows, 3 * width) and out.shape == (rows, width) and slots.shape == (rows,)
    assert qkv.dtype == out.dtype == k_pages.dtype and scale > 0
    assert qkv.stride(1) == out.stride(1) == block_table.stride(1) == 1
    assert lengths.is_contiguous() and query_starts.is_contiguous() and len(query_starts) == seqs + 1
    if not rows or not width or not seqs:
        return
    entry = blocks(target_of(qkv.device), head_dim, qkv.dtype, max_queries, seqs * n_head)
    _prefill_kernel[(cdiv(max_queries, entry.queries), n_head, seqs)](
        qkv, k_pages, v_pages, block_table, lengths, query_starts, slots, out,
        qkv.stride(0), block_table.stride(0), slots.stride(0), out.stride(0),
        rows, columns, num_pages, n_head, scale * LOG2_E,
        PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK_M=entry.queries, BLOCK_N=entry.keys,
        PRECISION=precision(qkv.dtype),
        num_warps=entry.warps, num_stages=entry.stages,
        # not told so, ptxas spills for sm_100 (SASS of triton 3.9)
        **(registers(255) if head_dim == 128 and qkv.dtype == torch.float32 else {}), **COMPILE,
    )  # fmt: skip
