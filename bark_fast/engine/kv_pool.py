"""The paged key-value cache of one model: page tensors, and the pool that says who owns which page."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bark_fast.config import GPTConfig
from bark_fast.engine.page_pool import make_pool
from bark_fast.engine.transfers import sent
from bark_fast.ops import paged_kv, paged_kv_reference
from bark_fast.ops.attention import attention
from bark_fast.ops.decode_layers import PagedRows
from bark_fast.ops.dispatch import uses_triton
from bark_fast.ops.paged_prefill import paged_prefill

PAGE_SIZE = 16
MAX_PAGED_QUERIES = 8
"""Sequences with at most this many new tokens attend over pages, longer ones over a contiguous view."""


@dataclass(frozen=True)
class StepBatch:
    """Where the new tokens of one step go and what they attend to. One for all layers.

    counts, totals: new tokens and all keys of each sequence. On the device: slots (rows,) int64, block_tables
    (sequences, pages) int32, lengths (sequences,) int32 as `totals`. The first `paged` sequences attend over
    pages; query_starts (paged + 1,) int32 are their first rows, prefill_starts those of the others, counted
    from the first of these.
    """

    counts: list[int]
    totals: list[int]
    slots: Tensor
    block_tables: Tensor
    lengths: Tensor
    query_starts: Tensor
    prefill_starts: Tensor
    paged: int


class KVPool:
    """Keys and values of one model in pages, per layer (num_pages, n_head, PAGE_SIZE, head_dim).

    Page tensors are allocated once, for `num_pages`; a CPU commits their memory only as it is written.
    """

    def __init__(self, config: GPTConfig, device: torch.device, dtype: torch.dtype, num_pages: int) -> None:
        shape = (num_pages, config.n_head, PAGE_SIZE, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.config, self.device = config, device
        self.pool = make_pool(num_pages, PAGE_SIZE)
        self.max_pages = -(-config.block_size // PAGE_SIZE)
        self.scratch = None  # a GPU splits long contexts over blocks and needs room to put them together
        if device.type == "cuda":
            rows = MAX_PAGED_QUERIES * max(1, num_pages // self.max_pages)
            self.scratch = paged_kv.attention_scratch(rows, config.n_head, config.head_dim, device)

    def fits(self, handles: Items[int], counts: Items[int]) -> bool:
        """Whether `extend` would find enough pages. Exact, and changes nothing."""
        return self.pool.can_extend(np.asarray(handles, dtype=np.int64), np.asarray(counts, dtype=np.int32))

    def extend(
        self, handles: Items[int], counts: Items[int]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int32], int]:
        """Make room for `counts` new tokens of each sequence, all or none (OutOfPages), in one call.

        Pages that are written while shared are copied first. Returns block tables (sequences, pages), slots of
        the new tokens in order, lengths with them, and how many pages were copied.
        """
        tables = np.empty((len(handles), self.max_pages), dtype=np.int32)
        slots = np.empty(sum(counts), dtype=np.int64)
        lengths = np.empty(len(handles), dtype=np.int32)
        copies = self.pool.step(
            np.asarray(handles, dtype=np.int64), np.asarray(counts, dtype=np.int32), tables, slots, lengths
        )
        if len(copies):
            pairs = self._tensor(copies)
            for keys, values in zip(self.keys, self.values, strict=True):
                paged_kv.copy_pages(keys, values, pairs)
        return tables, slots, lengths, len(copies)

    def reserve(self, handles: Items[int], counts: Items[int]) -> StepBatch:
        """As `extend`, for a step. Sequences of at most `MAX_PAGED_QUERIES` new tokens must come first."""
        tables, slots, lengths, _ = self.extend(handles, counts)
        paged = sum(count <= MAX_PAGED_QUERIES for count in counts)
        starts, prefill_starts = (
            self._tensor(np.cumsum([0, *part], dtype=np.int32)) for part in (counts[:paged], counts[paged:])
        )
        return StepBatch(
            list(counts),
            lengths.tolist(),
            self._tensor(slots),
            self._tensor(tables),
            self._tensor(lengths),
            starts,
            prefill_starts,
            paged,
        )

    def paged_rows(self, batch: StepBatch) -> PagedRows | None:
        """For a step of a few rows a sequence, on the CPU: what `GPT.decode` wants."""
        if self.device.type != "cpu" or batch.paged != len(batch.counts):
            return None
        tables = batch.block_tables, batch.lengths, batch.query_starts
        return PagedRows(self.keys, self.values, *tables, batch.slots)

    def attend(self, batch: StepBatch, layer: int, qkv: Tensor) -> Tensor:
        """Store keys and values of `qkv` (rows, 3 * n_embd) and attend: (rows, n_embd), heads merged."""
        heads, head_dim = self.config.n_head, self.config.head_dim
        keys, values = self.keys[layer], self.values[layer]
        if self.device.type != "cpu" and batch.totals and paged_kv.run_in_torch(keys):
            paged_kv_reference.store(qkv, keys, values, batch.slots)
            tables = batch.block_tables, batch.lengths
            return paged_kv_reference.attend(qkv, keys, values, *tables, batch.counts, batch.totals)
        out = qkv.new_empty(len(qkv), heads * head_dim)
        row = sum(batch.counts[: batch.paged])
        if batch.paged:
            paged_kv.append_attention(
                qkv[:row], keys, values, batch.block_tables[: batch.paged], batch.lengths[: batch.paged],
                batch.query_starts, batch.slots[:row], out[:row], scratch=self.scratch,
            )  # fmt: skip
        if batch.paged == len(batch.counts):
            return out
        if uses_triton(qkv, head_dim, multiplies=True):
            longest = max(batch.counts[batch.paged :])
            paged_prefill(
                qkv[row:], keys, values, batch.block_tables[batch.paged :], batch.lengths[batch.paged :],
                batch.prefill_starts, batch.slots[row:], out[row:], max_queries=longest,
            )  # fmt: skip
            return out
        paged_kv.append_kv(qkv[row:], keys, values, batch.slots[row:])
        for index in range(batch.paged, len(batch.counts)):
            count, total = batch.counts[index], batch.totals[index]
            fresh = qkv[row : row + count].view(count, 3, heads, head_dim)
            if total == count:
                key, value = fresh[:, 1].transpose(0, 1), fresh[:, 2].transpose(0, 1)
            else:
                table = batch.block_tables[index]
                key, value = (paged_kv.gather_kv(pages, table, total) for pages in (keys, values))
            # SDPA's fast paths want a batch dimension
            seen = attention(fresh[:, 0].transpose(0, 1)[None], key[None], value[None], causal=True)
            out[row : row + count] = seen[0].transpose(0, 1).reshape(count, -1)
            row += count
        return out

    def _tensor(self, array: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(array), self.device)
