"""The paged key-value cache in plain torch: any device, any floating dtype, no compiled code.

What `paged_kv` runs where the compiled extension is missing, and what it is tested against. Arguments are those
of the functions of the same name there. Attention is computed by torch in the dtype of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bark_fast.ops import attention


def check_values(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise ValueError for the first of `values` outside [low, high)."""
    wrong = ((values < low) | (values >= high)).flatten().nonzero()
    if len(wrong):
        index = int(wrong[0])
        value = int(values.flatten()[index])
        raise ValueError(f"{name}[{index}] is {value}; expected a value in [{low}, {high})")


def check_match(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has this dtype and shape."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; expected {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def check_append(qkv: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Raise ValueError unless dtypes and shapes fit one another."""
    _, n_head, _, head_dim = k_pages.shape
    check_match("v_pages", v_pages, k_pages.dtype, tuple(k_pages.shape))
    check_match("qkv", qkv, k_pages.dtype, (len(qkv), 3 * n_head * head_dim))
    check_match("slots", slots, torch.int64, (len(qkv),))


def append_kv(qkv: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `paged_kv.append_kv`."""
    num_pages, _, page_size, _ = k_pages.shape
    check_append(qkv, k_pages, v_pages, slots)
    check_values("slots", slots, -1, num_pages * page_size)
    rows = (slots >= 0).nonzero()[:, 0]
    store(qkv[rows], k_pages, v_pages, slots[rows])


def store(qkv: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """`append_kv` of slots known to be in range, on a GPU without a look at them."""
    _, n_head, page_size, head_dim = k_pages.shape
    page, offset = slots // page_size, slots % page_size
    _, key, value = qkv.view(len(qkv), 3, n_head, head_dim).unbind(1)
    k_pages[page, :, offset] = key
    v_pages[page, :, offset] = value


def gathered(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of the pages in `table`: (n_head, length, head_dim)."""
    _, n_head, page_size, head_dim = pages.shape
    used = table[: -(-length // page_size)].long()
    return pages[used].transpose(0, 1).reshape(n_head, len(used) * page_size, head_dim)[:, :length]


def check_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    out: Tensor,
) -> None:
    """Raise ValueError unless dtypes and shapes fit one another."""
    _, n_head, _, head_dim = k_pages.shape
    seqs, columns = block_table.shape
    check_match("v_pages", v_pages, k_pages.dtype, tuple(k_pages.shape))
    check_match("query", query, k_pages.dtype, (len(query), n_head, head_dim))
    check_match("out", out, k_pages.dtype, (len(query), n_head * head_dim))
    check_match("block_table", block_table, torch.int32, (seqs, columns))
    check_match("lengths", lengths, torch.int32, (seqs,))
    check_match("query_starts", query_starts, torch.int32, (seqs + 1,))


def check_tables(
    num_pages: int, page_size: int, rows: int, block_table: Tensor, lengths: Tensor, query_starts: Tensor
) -> tuple[list[int], list[int]]:
    """Starts and lengths as numbers; ValueError unless they and the pages in use are in range."""
    check_values("lengths", lengths, 0, block_table.shape[1] * page_size + 1)
    starts, keys = query_starts.tolist(), lengths.tolist()
    if starts[0] != 0 or starts[-1] != rows or starts != sorted(starts):
        raise ValueError(f"query_starts is {starts}; expected 0 to {rows}, not decreasing")
    for table, length in zip(block_table, keys, strict=True):
        check_values("block_table", table[: -(-length // page_size)], 0, num_pages)
    return starts, keys


def paged_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    """See `paged_kv.paged_attention`."""
    num_pages, _, page_size, head_dim = k_pages.shape
    check_attention(query, k_pages, v_pages, block_table, lengths, query_starts, out)
    starts, keys = check_tables(num_pages, page_size, len(query), block_table, lengths, query_starts)
    natural = head_dim**-0.5
    for seq, length in enumerate(keys):
        start, stop = starts[seq], starts[seq + 1]
        blind = min(max(stop - start - length, 0), stop - start)  # rows before the first key
        out[start : start + blind] = 0
        if start + blind < stop:
            rows = query[start + blind : stop] * (scale / natural)
            out[start + blind : stop] = _attend(rows, k_pages, v_pages, block_table[seq], length)


def _attend(rows: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Attention of the last rows (rows, n_head, head_dim) of one sequence: (rows, n_head * head_dim)."""
    key, value = (gathered(pages, table, length)[None] for pages in (k_pages, v_pages))
    seen = attention.reference(rows.transpose(0, 1)[None], key, value, causal=True)
    return seen[0].transpose(0, 1).flatten(1)


def queries(qkv: Tensor, k_pages: Tensor) -> Tensor:
    """q of the packed projection: (rows, n_head, head_dim), strided."""
    _, n_head, _, head_dim = k_pages.shape
    return qkv[:, : n_head * head_dim].view(len(qkv), n_head, head_dim)


def attend(
    qkv: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, counts: list[int],
    totals: list[int],
) -> Tensor:  # fmt: skip
    """`paged_attention` of rows whose keys are stored, by tables of the pool: on a GPU without a look.

    qkv: (rows, 3 * n_head * head_dim). counts: new rows of each sequence, at least one. totals: `lengths` once
    more, for the host. Returns (rows, n_head * head_dim).
    """
    _, n_head, page_size, head_dim = k_pages.shape
    query = queries(qkv, k_pages)
    if len(counts) > 1 and max(counts) == 1:
        columns = -(-max(totals) // page_size)
        used = block_table[:, :columns].long()  # -1 past a sequence's end: some page, which lengths keep out
        key, value = (
            pages[used].transpose(1, 2).reshape(len(counts), n_head, columns * page_size, head_dim)
            for pages in (k_pages, v_pages)
        )
        return attention.reference(query[:, :, None], key, value, False, lengths=lengths).flatten(1)
    each = zip(torch.split(query, counts), block_table, totals, strict=True)
    return torch.cat([_attend(rows, k_pages, v_pages, table, total) for rows, table, total in each])


def append_attention(
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    slots: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    """See `paged_kv.append_attention`."""
    num_pages, _, page_size, _ = k_pages.shape
    check_append(qkv, k_pages, v_pages, slots)
    query = queries(qkv, k_pages)
    check_attention(query, k_pages, v_pages, block_table, lengths, query_starts, out)
    check_tables(num_pages, page_size, len(qkv), block_table, lengths, query_starts)
    append_kv(qkv, k_pages, v_pages, slots)
    paged_attention(query, k_pages, v_pages, block_table, lengths, query_starts, out, scale)


def check_copy(k_pages: Tensor, v_pages: Tensor, pairs: Tensor) -> None:
    """Raise ValueError unless dtypes and shapes fit one another."""
    check_match("v_pages", v_pages, k_pages.dtype, tuple(k_pages.shape))
    check_match("pairs", pairs, torch.int32, (len(pairs), 2))


def copy_pages(k_pages: Tensor, v_pages: Tensor, pairs: Tensor) -> None:
    """See `paged_kv.copy_pages`."""
    check_copy(k_pages, v_pages, pairs)
    check_values("pairs", pairs, 0, len(k_pages))
    for source, destination in pairs.tolist():
        for pages in (k_pages, v_pages):
            pages[destination] = pages[source]


def check_gather(pages: Tensor, block_table: Tensor, length: int, out: Tensor) -> None:
    """Raise ValueError unless the length is in range and dtypes and shapes fit one another."""
    _, n_head, page_size, head_dim = pages.shape
    if not 0 <= length <= len(block_table) * page_size:
        raise ValueError(f"length is {length}; expected a value in [0, {len(block_table) * page_size}]")
    check_match("block_table", block_table, torch.int32, (len(block_table),))
    check_match("out", out, pages.dtype, (n_head, length, head_dim))


def gather_kv(pages: Tensor, block_table: Tensor, length: int, out: Tensor) -> None:
    """See `paged_kv.gather_kv`."""
    check_gather(pages, block_table, length, out)
    check_values("block_table", block_table[: -(-length // pages.shape[2])], 0, len(pages))
    out.copy_(gathered(pages, block_table, length))


def swap_pages(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """See `paged_kv.swap_pages`."""
    check_match("pairs", pairs, torch.int32, (len(pairs), 2))
    check_match("destination", destination, source.dtype, (len(destination), *source.shape[1:]))
    check_values("pairs[:, 0]", pairs[:, 0], 0, len(source))
    check_values("pairs[:, 1]", pairs[:, 1], 0, len(destination))
    for take, put in pairs.tolist():
        destination[put].copy_(source[take], non_blocking=True)
