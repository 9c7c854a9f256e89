"""Ragged prefill over a paged cache: new rows of several sequences attend and are stored, in one launch.

Beside `paged_kv`, whose page tensors, tables and errors these are. Triton runs on CUDA (the extension has no
such operation), plain torch elsewhere. No gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bark_fast.ops import attention
from bark_fast.ops import paged_kv_reference as reference
from bark_fast.ops.dispatch import define, is_eager, uses_triton, writes_in_place


def paged_prefill(
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    slots: Tensor,
    out: Tensor,
    scale: float | None = None,
    max_queries: int | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of each new row over its sequence up to it; the rows' K and V go to `slots`.

    qkv: (rows, 3 * n_head * head_dim), the packed projection q | k | v, rows any stride apart. Rows
    [query_starts[s], query_starts[s + 1]) are the last tokens of sequence s, which has lengths[s] tokens with
    them. The older ones are read from the pages of block_table[s], the new ones from qkv, whatever their slots;
    a row with slot -1 is not stored. Rows before a sequence's first token (lengths[s] < its rows) are no keys
    and give zeros. Shapes and dtypes as in `paged_kv.paged_attention` and `append_kv`; out: (rows, n_head *
    head_dim), which is returned. scale: positive, head_dim ** -0.5 unless given.

    Slots must be distinct, and none may be that of an older token some sequence of this call reads: what is
    shared is copied first. max_queries: at least the rows of the longest sequence; the grid follows from it and
    from shapes, so that a captured graph stays right when lengths and starts change. Without it, all rows.
    Where the tables lie on a GPU it cannot be checked: rows of a sequence beyond it would be neither computed
    nor stored.
    """
    if scale is None:
        scale = k_pages.shape[-1] ** -0.5
    longest = len(qkv) if max_queries is None else max_queries
    arguments = (qkv, k_pages, v_pages, block_table, lengths, query_starts, slots, out, scale, longest)
    if is_eager(k_pages):
        _paged_prefill(*arguments)
    else:
        torch.ops.bark_fast.paged_prefill(*arguments)
    return out


def _paged_prefill(
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    slots: Tensor,
    out: Tensor,
    scale: float,
    max_queries: int,
) -> None:
    reference.check_append(qkv, k_pages, v_pages, slots)
    n_head, head_dim = k_pages.shape[1], k_pages.shape[3]
    query = reference.queries(qkv, k_pages)
    reference.check_attention(query, k_pages, v_pages, block_table, lengths, query_starts, out)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive value")
    if max_queries < 0 or (len(qkv) and not max_queries):
        raise ValueError(f"max_queries is {max_queries}; expected the rows of the longest sequence")
    if uses_triton(k_pages, head_dim, multiplies=True):
        from bark_fast.kernels import paged_prefill as kernels

        kernels.paged_prefill(
            qkv, k_pages, v_pages, block_table, lengths, query_starts, slots, out, scale, max_queries
        )
        return
    num_pages, _, page_size, _ = k_pages.shape
    starts, totals = reference.check_tables(num_pages, page_size, len(qkv), block_table, lengths, query_starts)
    reference.append_kv(qkv, k_pages, v_pages, slots)
    for seq, total in enumerate(totals):
        start, stop = starts[seq], starts[seq + 1]
        if stop - start > max_queries:
            raise ValueError(f"max_queries is {max_queries}; sequence {seq} has {stop - start} rows")
        first = start + max(stop - start - total, 0)  # the first row with a place in the sequence
        out[start:first] = 0
        if first == stop:
            continue
        rows = qkv[first:stop].view(stop - first, 3, n_head, head_dim).permute(1, 2, 0, 3)
        older = total - (stop - first)
        key, value = (
            torch.cat((reference.gathered(pages, block_table[seq], older), fresh), 1)
            for pages, fresh in ((k_pages, rows[1]), (v_pages, rows[2]))
        )
        seen = attention.attention(rows[0][None], key[None], value[None], causal=True, scale=scale)
        out[first:stop] = seen[0].transpose(0, 1).flatten(1)


define(
    "paged_prefill(Tensor qkv, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor lengths, "
    "Tensor query_starts, Tensor slots, Tensor(c!) out, float scale, SymInt max_queries) -> ()",
    _paged_prefill,
    writes_in_place,
)
