"""Ragged batches in a paged cache, and the same computation in plain torch, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bark_fast.ops import paged_kv_reference as reference

SPARE = 3


@dataclass
class Batch:
    """A ragged batch. Pages that no sequence owns, and tails of last pages, hold NaN."""

    qkv: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    lengths: Tensor
    query_starts: Tensor

    @property
    def query(self) -> Tensor:
        """q where the packed projection left it: (rows, n_head, head_dim), strided."""
        _, n_head, _, head_dim = self.k_pages.shape
        return self.qkv[:, : n_head * head_dim].view(len(self.qkv), n_head, head_dim)

    def out(self) -> Tensor:
        """Somewhere to write, full of NaN."""
        _, n_head, _, head_dim = self.k_pages.shape
        return self.qkv.new_full((len(self.qkv), n_head * head_dim), float("nan"))

    def arguments(self) -> tuple[Tensor, ...]:
        """What paged_attention takes before `out`."""
        return self.query, self.k_pages, self.v_pages, self.block_table, self.lengths, self.query_starts

    def new_slots(self) -> Tensor:
        """Where the rows' tokens belong: (rows,) int64; -1 for rows before a sequence's first token."""
        page_size, starts, slots = self.k_pages.shape[2], self.query_starts.tolist(), []
        for seq, total in enumerate(self.lengths.tolist()):
            for position in range(total - (starts[seq + 1] - starts[seq]), total):
                page = int(self.block_table[seq, max(position, 0) // page_size])
                slots.append(page * page_size + position % page_size if position >= 0 else -1)
        return torch.tensor(slots, dtype=torch.int64)

    def split_off_new(self) -> tuple[Batch, Tensor]:
        """The batch once its rows are stored, and their slots; here, in their places, comes NaN."""
        slots = self.new_slots()
        after = Batch(**{name: value.clone() for name, value in vars(self).items()})
        reference.append_kv(self.qkv, after.k_pages, after.v_pages, slots)
        nothing = torch.full_like(self.qkv, float("nan"))
        reference.append_kv(nothing, self.k_pages, self.v_pages, slots)
        return after, slots

    def to(self, device: str) -> Batch:
        """A copy on another device."""
        return Batch(**{name: value.to(device, copy=True) for name, value in vars(self).items()})


def make_batch(
    lengths: list[int],
    rows: list[int] | None = None,
    *,
    n_head: int = 12,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    pad: int = 0,
    seed: int = 0,
) -> Batch:
    """Sequences of `lengths` keys in pages drawn at random; `rows` queries each (one unless given).

    spread: standard deviation of queries; larger is a sharper softmax. pad: columns between rows of the
    projection.
    """
    random = torch.Generator().manual_seed(seed)
    rows = rows or [1] * len(lengths)
    need = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(need) + SPARE, generator=random).int()
    shape = (len(order), n_head, page_size, head_dim)
    k_pages, v_pages = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    table = torch.full((len(lengths), max(max(need), 1)), -1, dtype=torch.int32)
    first = 0
    for seq, (length, count) in enumerate(zip(lengths, need, strict=True)):
        table[seq, :count] = order[first : first + count]
        for pages in (k_pages, v_pages):
            tokens = torch.full((n_head, count * page_size, head_dim), float("nan"))
            tokens[:, :length] = torch.randn(n_head, length, head_dim, generator=random)
            pages[table[seq, :count].long()] = (
                tokens.view(n_head, count, page_size, head_dim).transpose(0, 1).to(dtype)
            )
        first += count
    width = 3 * n_head * head_dim
    qkv = torch.randn(sum(rows), width + pad, generator=random)
    qkv[:, : n_head * head_dim] *= spread
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    lengths_ = torch.tensor(lengths, dtype=torch.int32)
    return Batch(qkv.to(dtype)[:, :width], k_pages, v_pages, table, lengths_, starts)


def contiguous(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """(n_head, length, head_dim), token by token."""
    token = torch.arange(length)
    page_size = pages.shape[2]
    return pages[table[token // page_size].long(), :, token % page_size].transpose(0, 1)


def attend(batch: Batch, dtype: torch.dtype, scale: float | None = None, shift: int = 0) -> Tensor:
    """Torch's own attention in `dtype`, sequence by sequence. `shift` moves the causal mask, to break it."""
    out = []
    starts = batch.query_starts.tolist()
    for seq, length in enumerate(batch.lengths.tolist()):
        query = batch.query[starts[seq] : starts[seq + 1]].transpose(0, 1).to(dtype)
        key, value = (
            contiguous(pages, batch.block_table[seq], length).to(dtype)
            for pages in (batch.k_pages, batch.v_pages)
        )
        rows = query.shape[1]
        seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows + shift)
        hidden = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
        hidden = torch.where(seen.any(1)[None, :, None], hidden, torch.zeros_like(hidden))
        out.append(hidden.transpose(0, 1).flatten(1))
    return torch.cat(out)


def check_turns(attend_there: Callable[[Batch, Tensor], object], counters: Tensor) -> None:
    """Launches over one scratch that take turns between two inputs, also captured and replayed on a GPU.

    Parts that were joined before they had arrived would be the other input's. Of one input alone, launched
    again and again, they would be right.
    """
    device = counters.device.type
    heads, turns = (12, 50) if device == "cuda" else (1, 2)
    batches = [make_batch([1024], n_head=heads, seed=seed).to(device) for seed in (0, 1)]
    outs = [batch.out() for batch in batches]

    def step() -> None:
        for _ in range(turns):
            for batch, out in zip(batches, outs, strict=True):
                attend_there(batch, out)

    step()
    for batch, out in zip(batches, outs, strict=True):
        truth = attend(batch.to("cpu"), torch.float64)
        assert float((out.cpu().double() - truth).abs().max()) < 1e-5
    assert not counters.any()
    if device == "cuda":
        first = [out.clone() for out in outs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(100):
            for out in outs:
                out.fill_(torch.nan)
            graph.replay()
            assert all(map(torch.equal, outs, first))
        assert not counters.any()
