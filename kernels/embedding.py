"""Embeddings in one launch: token + position, the merged halves of a prompt, the fine model's sum of codebooks.

Everything is added in fp32 and rounded once to the tables' dtype. A row with an id or position outside its
table becomes NaN, which sampling reports; nothing outside a table is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.target import COMPILE, cdiv, on_its_device, power_of_2

MAX_CODEBOOKS = 8
"""EnCodec at 24 kHz has 8 codebooks; `embed_codes` takes as many tables."""


@triton.jit
def _table_row(table, index, rows, stride, columns, inside):
    """Row `index` of a table in fp32; NaN where there is no such row."""
    found = (index >= 0) & (index < rows)
    values = tl.load(table + tl.where(found, index, 0) * stride + columns, inside, 0.0).to(tl.float32)
    return tl.where(found, values, float("nan"))


@triton.jit
def _embed_kernel(
    ids, extra_ids, positions, tokens, places, out,
    id_stride, extra_stride, position_stride,
    width, token_rows, place_rows, token_stride, place_stride, out_stride,
    HAS_EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = _table_row(
        tokens, tl.load(ids + row * id_stride).to(tl.int64), token_rows, token_stride, columns, inside
    )
    if HAS_EXTRA:
        extra = tl.load(extra_ids + row * extra_stride).to(tl.int64)
        if extra != -1:
            x += _table_row(tokens, extra, token_rows, token_stride, columns, inside)
    position = tl.load(positions + row * position_stride).to(tl.int64)
    x += _table_row(places, position, place_rows, place_stride, columns, inside)
    tl.store(out + row * out_stride + columns, x.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["time", "batch_stride"])
def _embed_codes_kernel(
    codes, table0, table1, table2, table3, table4, table5, table6, table7, places, out,
    time, width, table_rows, table_stride, place_stride, batch_stride, time_stride, code_stride, out_stride,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row % time
    codes += row // time * batch_stride + place * time_stride
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    tables = (table0, table1, table2, table3, table4, table5, table6, table7)
    x = tl.zeros([BLOCK], tl.float32)
    for index in tl.static_range(COUNT):
        code = tl.load(codes + index * code_stride).to(tl.int64)
        x += _table_row(tables[index], code, table_rows, table_stride, columns, inside)
    x += tl.load(places + place * place_stride + columns, inside, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, x.to(out.dtype.element_ty), inside)


def _blocks(width: int) -> tuple[int, int, int]:
    """Columns a program takes, programs a row, warps: 16 bytes of bf16 a thread and load."""
    block = min(power_of_2(width), 1024)
    return block, cdiv(width, block), max(1, block // 256)


@on_its_device
def embed(ids: Tensor, positions: Tensor, tokens: Tensor, places: Tensor, extra_ids: Tensor | None) -> Tensor:
    """tokens[ids] + tokens[extra_ids] + places[positions], (rows, width), as in `ops.embedding`."""
    extra = ids if extra_ids is None else extra_ids
    assert ids.dim() == 1 and ids.shape == positions.shape == extra.shape
    assert tokens.stride(1) == places.stride(1) == 1 and tokens.dtype == places.dtype
    rows, width = len(ids), tokens.shape[1]
    out = torch.empty(rows, width, dtype=tokens.dtype, device=tokens.device)
    if rows:
        block, pieces, warps = _blocks(width)
        _embed_kernel[(rows, pieces)](
            ids, extra, positions, tokens, places, out,
            ids.stride(0), extra.stride(0), positions.stride(0),
            width, len(tokens), len(places), tokens.stride(0), places.stride(0), out.stride(0),
            HAS_EXTRA=extra_ids is not None, BLOCK=block, num_warps=warps, **COMPILE,
        )  # fmt: skip
    return out


@on_its_device
def embed_codes(codes: Tensor, tables: list[Tensor], places: Tensor) -> Tensor:
    """places + the sum of tables[i][codes[..., i]], (batch, time, width), as in `ops.embedding`."""
    assert 0 < len(tables) <= MAX_CODEBOOKS and len(tables) <= codes.shape[2]
    first = tables[0]
    assert all(t.shape == first.shape and t.stride() == first.stride() and t.stride(1) == 1 for t in tables)
    assert places.stride(1) == 1 and len(places) >= codes.shape[1] and places.dtype == first.dtype
    batch, time, _ = codes.shape
    rows, width = first.shape
    out = torch.empty(batch, time, width, dtype=first.dtype, device=first.device)
    if batch * time:
        block, pieces, warps = _blocks(width)
        padded = [*tables, *[first] * (MAX_CODEBOOKS - len(tables))]
        _embed_codes_kernel[(batch * time, pieces)](
            codes, *padded, places, out,
            time, width, rows, first.stride(0), places.stride(0), *codes.stride(), out.stride(1),
            COUNT=len(tables), BLOCK=block, num_warps=warps, **COMPILE,
        )  # fmt: skip
    return out
