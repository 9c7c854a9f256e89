"""The paged key-value cache: rows into pages, copies of pages, a sequence gathered, attention of a decode step.

K and V pages are (num_pages, n_head, page_size, head_dim), contiguous; a token's slot is page * page_size +
offset. Attention is softmax(scale * q k^T) v with products and sums in float32 and an online softmax in base 2.
Tables lie on the device, unread by the host: a page or slot out of range counts as absent and is never
followed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.attention import HEAD_DIMS, LOG2_E, wide
from bark_fast.kernels.target import COMPILE, cdiv, on_its_device, power_of_2, registers, target_of

PAGE_SIZES = (16, 32, 64)
MAX_PARTS = 32
LEAST_PART = 64
"""Keys of a part: below that joining costs more than it gains."""
MAX_ROWS = 65_535
"""Of a grid's third dimension."""


@triton.jit
def token_places(
    table, tokens, wanted, num_pages, n_head, head, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Element offsets (64 bits) of a sequence's tokens in its pages, and which of them are there."""
    page = tl.load(table + tokens // PAGE_SIZE, wanted, -1)
    there = (page >= 0) & (page < num_pages)
    page = tl.where(there, page, 0).to(tl.int64)
    return ((page * n_head + head) * PAGE_SIZE + tokens % PAGE_SIZE) * HEAD_DIM, there


@triton.jit
def slot_places(slots, num_pages, n_head, head, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Element offsets of slots (64 bits), and which of them are in range."""
    there = (slots >= 0) & (slots < num_pages * PAGE_SIZE)
    slots = tl.where(there, slots, 0)
    return ((slots // PAGE_SIZE * n_head + head) * PAGE_SIZE + slots % PAGE_SIZE) * HEAD_DIM, there


@triton.jit
def _join(maximum, total, acc):
    """One softmax state (maximum, total, acc) of the states in the rows of a tile; any may be empty."""
    highest = tl.max(maximum, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp2(maximum - base)
    return highest, tl.sum(total * share, 0), tl.sum(acc * share[:, None], 0)


@triton.jit
def _take(q, k, v, maximum, total, acc):
    """The softmax state (maximum, total, acc) with one key more."""
    score = tl.sum(q * k.to(tl.float32), 0)
    highest = tl.maximum(maximum, score)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    keep, weight = tl.exp2(maximum - base), tl.exp2(score - base)
    return highest, total * keep + weight, acc * keep + weight * v.to(tl.float32)


@triton.jit(do_not_specialize=["seqs", "columns", "num_pages"])
def _decode_kernel(
    query, k_pages, v_pages, block_table, lengths, query_starts, slots, out, partials, counters,
    query_row, query_head, table_stride, slot_stride, out_row,
    seqs, columns, num_pages, scale,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    PARTS: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, n_head = tl.num_programs(0), tl.num_programs(1)
    dims = tl.arange(0, HEAD_DIM)
    own = query + row.to(tl.int64) * query_row + head * query_head + dims
    width = n_head.to(tl.int64) * query_head
    q = tl.load(own).to(tl.float32) * scale
    if APPEND:  # asked for before anything is waited for
        own_k, own_v = tl.load(own + width), tl.load(own + 2 * width)
        slot = tl.load(slots + row.to(tl.int64) * slot_stride)

    # the last sequence that starts at this row or before: all starts at once, since a search by halves would
    # wait for memory at every step
    seq = -1
    for first in range(0, seqs, 128):
        index = first + tl.arange(0, 128)
        starts = tl.load(query_starts + index, index < seqs, 2**31 - 1)
        seq += tl.sum((starts <= row).to(tl.int32), 0)
    seq = tl.maximum(seq, 0)
    start, stop = tl.load(query_starts + seq), tl.load(query_starts + seq + 1)
    length = tl.minimum(tl.maximum(tl.load(lengths + seq), 0), columns * PAGE_SIZE)
    # a row outside its sequence (query_starts is wrong) sees nothing
    keys = tl.where((row >= start) & (row < stop), tl.maximum(length - (stop - 1 - row), 0), 0)
    fresh_keys = 0
    if APPEND:
        # keys of the call's own rows are read where the projection left them, by the last part; the first one
        # stores its row: no program reads what another one writes
        older = tl.maximum(length - (stop - start), 0)
        fresh_keys = tl.where(part == parts - 1, tl.maximum(keys - older, 0), 0)
        keys = tl.minimum(keys, older)
    pieces = tl.cdiv(keys, 16)
    first_key = pieces * part // parts * 16
    end = tl.minimum(pieces * (part + 1) // parts * 16, keys)
    table = block_table + seq.to(tl.int64) * table_stride

    # Each row of the tile has a softmax of its own, joined after the loop: nothing in it waits for another
    # warp.
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for at in range(first_key, end, BLOCK):
        tokens = at + tl.arange(0, BLOCK)
        place, there = token_places(table, tokens, tokens < end, num_pages, n_head, head, PAGE_SIZE, HEAD_DIM)
        lie = place[:, None] + dims[None, :]
        k = tl.load(k_pages + lie, there[:, None], 0.0)
        v = tl.load(v_pages + lie, there[:, None], 0.0)
        score = tl.where(there, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        highest = tl.maximum(maximum, score)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        keep, weight = tl.exp2(maximum - base), tl.exp2(score - base)
        total = total * keep + weight
        acc = acc * keep[:, None] + weight[:, None] * v.to(tl.float32)
        maximum = highest
    best, sum_, o = _join(maximum, total, acc)

    if APPEND:
        for back in range(fresh_keys - 1, 0, -1):  # none in a decode step; rows of a sequence are in a row
            key = own + width - wide(back) * query_row
            best, sum_, o = _take(q, tl.load(key), tl.load(key + width), best, sum_, o)
        if fresh_keys > 0:
            best, sum_, o = _take(q, own_k, own_v, best, sum_, o)
        home, stored = slot_places(slot, num_pages, n_head, head, PAGE_SIZE, HEAD_DIM)
        stored = dims < tl.where(stored & (part == 0), HEAD_DIM, 0)
        tl.store(k_pages + home + dims, own_k, stored)
        tl.store(v_pages + home + dims, own_v, stored)
    out += row.to(tl.int64) * out_row + head * HEAD_DIM
    if SPLIT:
        # The last part of this row and head to arrive joins them all, in the same order whichever it is, and
        # leaves the counter at zero, so that a captured graph can be replayed. The barrier puts the stores of
        # all threads before the one thread's release; the loads pass the L1, which may hold what lay here
        # before.
        pair = row.to(tl.int64) * n_head + head
        heads_of_all = n_head.to(tl.int64) * tl.num_programs(2)
        values = partials + pair * parts * HEAD_DIM
        sums = partials + heads_of_all * parts * HEAD_DIM + pair * parts * 2
        tl.store(values + part * HEAD_DIM + dims, o)
        tl.store(sums + part * 2, best)
        tl.store(sums + part * 2 + 1, sum_)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == parts - 1:
            every = tl.arange(0, PARTS)
            used = every < parts
            maxima = tl.load(sums + every * 2, used, float("-inf"), cache_modifier=".cg")
            totals = tl.load(sums + every * 2 + 1, used, 0.0, cache_modifier=".cg")
            where = values + every[:, None] * HEAD_DIM + dims[None, :]
            accs = tl.load(where, used[:, None], 0.0, cache_modifier=".cg")
            _, all_, joined = _join(maxima, totals, accs)
            tl.store(out + dims, (joined / tl.where(all_ == 0.0, 1.0, all_)).to(out.dtype.element_ty))
            tl.store(counters + pair, 0)
    else:
        tl.store(out + dims, (o / tl.where(sum_ == 0.0, 1.0, sum_)).to(out.dtype.element_ty))


# slots may begin anywhere, behind those of other rows
@triton.jit(do_not_specialize=["num_pages", "n_head"], do_not_specialize_on_alignment=["slots"])
def _append_kernel(
    qkv, k_pages, v_pages, slots, qkv_row, slot_stride, num_pages, n_head,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    width = n_head * HEAD_DIM
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row * slot_stride)
    place, there = slot_places(slot, num_pages, n_head, columns // HEAD_DIM, PAGE_SIZE, HEAD_DIM)
    place += columns % HEAD_DIM
    inside = columns < tl.where(there, width, 0)
    source = qkv + row * qkv_row + width + columns
    tl.store(k_pages + place, tl.load(source, inside), inside)
    tl.store(v_pages + place, tl.load(source + width, inside), inside)


@triton.jit(do_not_specialize=["num_pages", "count"])
def _copy_kernel(k_pages, v_pages, pairs, pair_stride, num_pages, count, page_elements, BLOCK: tl.constexpr):
    # one program takes the same piece of a page through all pairs, so that their order holds
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < page_elements
    pages = k_pages
    if tl.program_id(1) == 1:
        pages = v_pages
    for index in range(count):
        source = tl.load(pairs + index * pair_stride).to(tl.int64)
        destination = tl.load(pairs + index * pair_stride + 1).to(tl.int64)
        if (source >= 0) & (source < num_pages) & (destination >= 0) & (destination < num_pages):
            piece = tl.load(pages + source * page_elements + columns, inside)
            tl.store(pages + destination * page_elements + columns, piece, inside)


@triton.jit(do_not_specialize=["num_pages", "length"], do_not_specialize_on_alignment=["table"])
def _gather_kernel(
    pages, table, out, out_head, out_token, num_pages, length,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    inside = tokens < length
    place, there = token_places(table, tokens, inside, num_pages, tl.num_programs(1), head, PAGE_SIZE, HEAD_DIM)
    values = tl.load(pages + place[:, None] + dims, there[:, None], 0.0)
    target = out + head * out_head + tokens.to(tl.int64)[:, None] * out_token + dims
    tl.store(target, values, inside[:, None])


def check_pages(*pages: Tensor) -> None:
    """What every operation asks of K and V pages."""
    for each in pages:
        assert each.dim() == 4 and each.is_contiguous() and each.shape == pages[0].shape
        assert each.shape[2] in PAGE_SIZES and each.shape[3] in HEAD_DIMS and each.dtype == pages[0].dtype


@on_its_device
def paged_attention(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, query_starts: Tensor,
    out: Tensor, scale: float, partials: Tensor | None, counters: Tensor | None, slots: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of each row over its sequence's pages, as in `ops.paged_kv`; split where there is scratch.

    slots: (rows,), for `append_attention`: query is then the first third of the packed projection, whose K and
    V of each row go there.
    """
    check_pages(k_pages, v_pages)
    rows, n_head, head_dim = query.shape
    num_pages, _, page_size, _ = k_pages.shape
    seqs, columns = block_table.shape
    assert query.stride(2) == out.stride(1) == block_table.stride(1) == 1 and rows <= MAX_ROWS
    assert lengths.is_contiguous() and query_starts.is_contiguous()
    pairs = rows * n_head
    if not pairs or not seqs:
        out.zero_()
        return
    # two programs a processor keep the memory busy; the rule sees shapes only, so that a captured graph stays
    # right whatever the lengths become
    parts = min(cdiv(2 * target_of(query.device).processors, pairs), columns * page_size // LEAST_PART)
    if partials is None or counters is None or counters.numel() < pairs:
        parts = 1
    else:
        parts = max(1, min(parts, partials.numel() // (pairs * (head_dim + 2)), MAX_PARTS))
    # 16 KB of K and V a turn, eight loads a thread: what four programs of a processor must have on the way to
    # saturate the memory (bandwidth times latency is about 20 KB a processor). Given the registers that four
    # programs leave each other, all eight are issued before the first is waited for; not given them, one to six
    # are (SASS of triton 3.9).
    _decode_kernel[(parts, n_head, rows)](
        query, k_pages, v_pages, block_table, lengths, query_starts, lengths if slots is None else slots, out,
        partials if parts > 1 else out, counters if parts > 1 else lengths,
        query.stride(0), query.stride(1), block_table.stride(0), 0 if slots is None else slots.stride(0),
        out.stride(0), seqs, columns, num_pages, scale * LOG2_E,
        PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK=8192 // (head_dim * k_pages.element_size()),
        SPLIT=parts > 1, PARTS=MAX_PARTS, APPEND=slots is not None,
        num_warps=4, num_stages=1, **registers(128), **COMPILE,
    )  # fmt: skip


@on_its_device
def append_kv(qkv: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """K and V of each row to its slot, as in `ops.paged_kv`."""
    check_pages(k_pages, v_pages)
    num_pages, n_head, page_size, head_dim = k_pages.shape
    width = n_head * head_dim
    assert qkv.shape == (len(slots), 3 * width) and qkv.stride(1) == 1 and qkv.dtype == k_pages.dtype
    if len(qkv) and width:
        block = min(power_of_2(width), 1024)
        _append_kernel[(len(qkv), cdiv(width, block))](
            qkv, k_pages, v_pages, slots, qkv.stride(0), slots.stride(0), num_pages, n_head,
            PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK=block, num_warps=max(1, block // 256), **COMPILE,
        )  # fmt: skip


@on_its_device
def copy_pages(k_pages: Tensor, v_pages: Tensor, pairs: Tensor) -> None:
    """Whole pages within K and V, pair by pair, as in `ops.paged_kv`."""
    check_pages(k_pages, v_pages)
    assert pairs.shape == (len(pairs), 2) and pairs.stride(1) == 1
    elements = k_pages[0].numel() if len(k_pages) else 0
    if len(pairs) and elements:
        _copy_kernel[(cdiv(elements, 1024), 2)](
            k_pages, v_pages, pairs, pairs.stride(0), len(k_pages), len(pairs), elements,
            BLOCK=1024, num_warps=4, num_stages=1, **COMPILE,
        )  # fmt: skip


@on_its_device
def gather_kv(pages: Tensor, block_table: Tensor, length: int, out: Tensor) -> None:
    """The first `length` tokens of one sequence, as in `ops.paged_kv`."""
    check_pages(pages)
    num_pages, n_head, page_size, head_dim = pages.shape
    assert out.shape == (n_head, length, head_dim) and out.stride(2) == 1 and block_table.stride(0) == 1
    assert out.dtype == pages.dtype and length <= len(block_table) * page_size
    if out.numel():
        block = 4096 // head_dim
        _gather_kernel[(cdiv(length, block), n_head)](
            pages, block_table, out, out.stride(0), out.stride(1), num_pages, length,
            PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK=block, num_warps=4, **COMPILE,
        )  # fmt: skip
