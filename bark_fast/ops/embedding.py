"""Embedding sums: token + position, the semantic prompt's merged halves, the fine model's codebooks.

Triton adds in float32 and rounds once; torch rounds after every addition. In float32 they agree to the bit.
An id or position outside its table: IndexError on the CPU; on a GPU Triton makes that row NaN, which sampling
reports as `INVALID_TOKEN`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bark_fast.ops.dispatch import define, is_eager, uses_triton

NO_TOKEN = -1
"""In `extra_ids`: nothing is added to this row."""


def embed(
    ids: Tensor, positions: Tensor, tokens: Tensor, places: Tensor, extra_ids: Tensor | None = None
) -> Tensor:
    """tokens[ids] + tokens[extra_ids] + places[positions]: (rows, width) in the tables' dtype.

    ids, positions, extra_ids: (rows,) int64, extra_ids `NO_TOKEN` where a row has no second half. tokens:
    (vocabulary, width). places: (context, width).
    """
    if is_eager(ids):
        return _embed(ids, positions, tokens, places, extra_ids)
    result: Tensor = torch.ops.bark_fast.embed(ids, positions, tokens, places, extra_ids)
    return result


def embed_codes(codes: Tensor, tables: list[Tensor], places: Tensor) -> Tensor:
    """sum of tables[i][codes[..., i]] + places[: time]: (batch, time, width) in the tables' dtype.

    codes: (batch, time, codebooks) int64, any strides; the first len(tables) codebooks are summed, at most 8.
    tables: (codes, width) each, of one shape. places: (context, width), context >= time.
    """
    if is_eager(codes):
        return _embed_codes(codes, tables, places)
    result: Tensor = torch.ops.bark_fast.embed_codes(codes, tables, places)
    return result


def _embed(ids: Tensor, positions: Tensor, tokens: Tensor, places: Tensor, extra_ids: Tensor | None) -> Tensor:
    if uses_triton(tokens):
        from bark_fast.kernels import embedding as kernels

        summed: Tensor = kernels.embed(ids, positions, tokens, places, extra_ids)
        return summed
    x = embedding(ids, tokens)
    if extra_ids is not None:
        none = extra_ids == NO_TOKEN
        x = x + embedding(extra_ids.masked_fill(none, 0), tokens).masked_fill(none[:, None], 0)
    return x + embedding(positions, places)


def _embed_codes(codes: Tensor, tables: list[Tensor], places: Tensor) -> Tensor:
    if uses_triton(places):
        from bark_fast.kernels import embedding as kernels

        summed: Tensor = kernels.embed_codes(codes, tables, places)
        return summed
    x = embedding(codes[..., 0], tables[0])
    for index, table in enumerate(tables[1:], start=1):
        x = x + embedding(codes[..., index], table)
    return x + places[: codes.shape[1]]


def _fake_embed(
    ids: Tensor, positions: Tensor, tokens: Tensor, places: Tensor, extra_ids: Tensor | None
) -> Tensor:
    return tokens.new_empty(ids.shape[0], tokens.shape[1])


def _fake_embed_codes(codes: Tensor, tables: list[Tensor], places: Tensor) -> Tensor:
    return places.new_empty(codes.shape[0], codes.shape[1], places.shape[1])


define(
    "embed(Tensor ids, Tensor positions, Tensor tokens, Tensor places, Tensor? extra_ids) -> Tensor",
    _embed,
    _fake_embed,
)
define("embed_codes(Tensor codes, Tensor[] tables, Tensor places) -> Tensor", _embed_codes, _fake_embed_codes)
