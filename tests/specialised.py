"""Kernels Triton would compile as a server's batches change size: prints how many of each, as JSON.

A process of its own, without TRITON_INTERPRET. Launchers are called on meta tensors; nothing is compiled. With
--all, Triton specialises on every argument, as it does where a kernel does not forbid it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from compiled import set_offline
from triton.runtime import JITFunction

from bark_fast.kernels import decode_state, embedding, head_sampling, norm_linear, paged_kv, philox, sampling
from bark_fast.kernels import paged_prefill as prefill
from bark_fast.kernels.target import KNOWN, assume
from bark_fast.rule_layout import RuleFloat, RuleInt

WIDTH, HEADS, HEAD_DIM, PAGE_SIZE, COLUMNS = 768, 12, 64, 16, 64
SCALE = HEAD_DIM**-0.5

half = partial(torch.empty, dtype=torch.float16, device="meta")
int32 = partial(torch.empty, dtype=torch.int32, device="meta")
int64 = partial(torch.empty, dtype=torch.int64, device="meta")


def linear(rows: int) -> None:
    norm_linear.linear(half(rows, WIDTH), half(WIDTH, WIDTH), residual=half(rows, WIDTH))


def sample(rows: int) -> None:
    rules, numbers = int32(rows, len(RuleInt)), torch.empty(rows, len(RuleFloat), device="meta")
    sampling.sample(half(rows, 1024), None, rules, numbers, int64(rows, 4), 1024)


def head_sample(rows: int) -> None:
    rules, numbers = int32(rows, len(RuleInt)), torch.empty(rows, len(RuleFloat), device="meta")
    head_sampling.head_sample(
        half(rows, WIDTH), half(WIDTH), None, half(12_096, WIDTH), None, rules, numbers, int64(rows, 4), 1024
    )


def advance(rows: int) -> None:
    tokens, ids, positions, slots, eos = (int64(rows) for _ in range(5))
    decode_state.advance(
        tokens, ids, positions, int32(rows), slots, int64(rows, 4), int32(rows), eos, int32(rows, COLUMNS),
        int32(rows, 16), PAGE_SIZE,
    )  # fmt: skip


def embed_codes(time: int) -> None:
    embedding.embed_codes(int64(1, time, 8), [half(1056, WIDTH)] * 8, half(1024, WIDTH))


def exponential(rows: int) -> None:
    philox.exponential(int64(rows, 4), 1024)


def behind(rows: int) -> None:
    """What `KVPool.attend` does with so many rows that decode, a prompt of 32 rows behind them."""
    seqs, packed = rows + 1, rows + 32
    pages = half(512, HEADS, PAGE_SIZE, HEAD_DIM)
    qkv, out, slots = half(packed, 3 * WIDTH), half(packed, WIDTH), int64(packed)
    tables, lengths = int32(seqs, COLUMNS), int32(seqs)
    query = qkv[:rows, :WIDTH].view(rows, HEADS, HEAD_DIM)
    paged_kv.paged_attention(
        query, pages, pages, tables[:rows], lengths[:rows], int32(rows + 1), out[:rows], SCALE, None, None,
        slots[:rows],
    )  # fmt: skip
    prefill.paged_prefill(
        qkv[rows:], pages, pages, tables[rows:], lengths[rows:], int32(2), slots[rows:], out[rows:], SCALE, 32
    )
    paged_kv.append_kv(qkv[rows:], pages, pages, slots[rows:])


CASES: dict[Callable[[int], None], tuple[int, ...]] = {
    linear: (5, 8, 15, 16),  # one block of 16 rows
    sample: (1, 2, 7, 16, 17),
    head_sample: (2, 7, 16),
    advance: (1, 2, 16, 17, 64),
    embed_codes: (1, 33, 1023, 1024),
    exponential: (1, 2, 7, 16, 17),
    behind: (1, 2, 3, 4, 8, 16),
}


def keys() -> Iterator[tuple[str, str]]:
    """Every kernel launched and what Triton would look it up by."""
    seen: list[tuple[str, str]] = []

    def note(self: JITFunction[Any], key: str, *_: object, **__: object) -> None:
        seen.append((self.fn.__name__, key))

    run = JITFunction.run
    with (
        assume(KNOWN[90]),
        patch.object(JITFunction, "_do_compile", note),
        patch.object(JITFunction, "run", lambda self, *a, **k: run(self, *a, **{**k, "warmup": True})),
    ):
        for call, sizes in CASES.items():
            for size in sizes:
                call(size)
    yield from seen


if __name__ == "__main__":
    if "--all" in sys.argv:
        for module in (
            decode_state,
            embedding,
            head_sampling,
            norm_linear.matmul,
            paged_kv,
            philox,
            prefill,
            sampling,
        ):
            for kernel in vars(module).values():
                for parameter in kernel.params if isinstance(kernel, JITFunction) else ():
                    parameter.do_not_specialize = parameter.do_not_specialize_on_alignment = False
    set_offline(90)
    distinct = defaultdict(set)
    for kernel, key in keys():
        distinct[kernel].add(key)
    json.dump({kernel: len(found) for kernel, found in distinct.items()}, sys.stdout)
