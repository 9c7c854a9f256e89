"""The paged cache of a model: whatever is fed in whatever pieces, each token attends to all before it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bark_fast.config import GPTConfig
from bark_fast.engine import kv_pool
from bark_fast.engine.kv_pool import MAX_PAGED_QUERIES, PAGE_SIZE, KVPool
from bark_fast.errors import OutOfPages
from bark_fast.ops import paged_kv
from bark_fast.ops.dispatch import prefer

CONFIG = GPTConfig(n_layer=2, n_head=3, n_embd=96, input_vocab_size=8, output_vocab_size=8)
CPU = torch.device("cpu")


def poisoned(num_pages=64, device=CPU):
    """A pool whose pages hold NaN until they are written."""
    pool = KVPool(CONFIG, device, torch.float32, num_pages)
    for pages in (*pool.keys, *pool.values):
        pages.fill_(torch.nan)
    return pool


def attention(past, new):
    """fp64 attention of the rows of `new` (rows, 288) over `past` (n, 288) and themselves, causal."""
    q, k, v = torch.cat([past, new]).double().view(-1, 3, 3, 32).permute(1, 2, 0, 3)
    n, rows = k.shape[1], len(new)
    scores = q[:, n - rows :] @ k.transpose(-1, -2) / 32**0.5
    scores = scores.masked_fill(~torch.ones(rows, n, dtype=torch.bool).tril(n - rows), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(rows, 96)


class Fed:
    """A sequence in the pool and, beside it, everything that was fed to it, by layer."""

    def __init__(self, pool, handle=None, past=None):
        self.pool = pool
        self.handle = pool.pool.create() if handle is None else handle
        self.past = past or [torch.empty(0, 288)] * CONFIG.n_layer

    def fork(self, length):
        """Another sequence that begins with the first `length` tokens."""
        return Fed(self.pool, self.pool.pool.fork(self.handle, length), [p[:length] for p in self.past])


def feed(pool, sequences, counts, generator):
    """Feed random rows to all; compare what every layer attends to with fp64."""
    batch = pool.reserve([s.handle for s in sequences], counts)
    for layer in range(CONFIG.n_layer):
        qkv = torch.randn(sum(counts), 288, generator=generator)
        got = pool.attend(batch, layer, qkv.to(pool.keys[0].device)).cpu()
        assert torch.isfinite(got).all()
        for seq, rows, out in zip(sequences, qkv.split(counts), got.split(counts), strict=True):
            assert (out - attention(seq.past[layer], rows)).abs().max() < 1e-5
            seq.past[layer] = torch.cat([seq.past[layer], rows])


@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_of_prefill_decode_fork_and_truncate(seed):
    random_schedule(seed, poisoned(256))


@pytest.mark.parametrize("seed", range(2))
def test_plain_torch_on_a_gpu_reads_no_tables(seed, monkeypatch):
    """Its checks of tables would have the host wait in each layer."""
    pool = poisoned(256)
    monkeypatch.setattr(paged_kv, "run_in_torch", lambda pages: True)
    for name in ("append_attention", "append_kv", "gather_kv"):  # which check
        monkeypatch.setattr(paged_kv, name, None)
    pool.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(kv_pool, "sent", lambda tensor, device: tensor)
    random_schedule(seed, pool)
    sequences, generator = [Fed(pool) for _ in range(3)], torch.Generator().manual_seed(seed)
    for counts in ([20, 9, 40], [1, 1, 1], [1, 1, 1]):  # steps of one row each go together
        feed(pool, sequences, counts, generator)


@pytest.mark.gpu
def test_plain_torch_does_not_wait_for_the_gpu():
    generator = torch.Generator().manual_seed(0)
    pool = poisoned(device=torch.device("cuda"))
    with prefer("torch"):
        sequences = [Fed(pool) for _ in range(3)]
        for counts in ([20, 9, 40], [1, 1, 1], [1, 3, 30]):
            feed(pool, sequences, counts, generator)
        batch = pool.reserve([one.handle for one in sequences], [1, 1, 1])
        qkv = torch.randn(3, 288, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            pool.attend(batch, 0, qkv)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def random_schedule(seed, pool):
    """Prefills, steps, forks and truncations, each compared with fp64; nothing is held in the end."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    sequences = [Fed(pool) for _ in range(4)]
    for _ in range(25):
        short = [int(n) for n in rng.integers(1, MAX_PAGED_QUERIES + 1, len(sequences))]
        counts = [n if rng.random() < 0.7 else int(rng.integers(9, 60)) for n in short]
        order = sorted(range(len(sequences)), key=lambda i: counts[i] > MAX_PAGED_QUERIES)
        feed(pool, [sequences[i] for i in order], [counts[i] for i in order], generator)
        chosen = int(rng.integers(len(sequences)))
        length = int(rng.integers(0, len(sequences[chosen].past[0]) + 1))
        if rng.random() < 0.5 and len(sequences) < 7:
            sequences.append(sequences[chosen].fork(length))
        else:
            pool.pool.truncate(sequences[chosen].handle, length)
            sequences[chosen].past = [p[:length] for p in sequences[chosen].past]
        if len(sequences) > 5:
            pool.pool.free(sequences.pop(0).handle)
    for seq in sequences:
        pool.pool.free(seq.handle)
    assert pool.pool.stats().pages_used == 0


def test_writing_into_a_shared_page_leaves_the_other_sequence_alone():
    generator = torch.Generator().manual_seed(0)
    pool = poisoned()
    first = Fed(pool)
    feed(pool, [first], [PAGE_SIZE + 5], generator)
    second = first.fork(PAGE_SIZE + 3)
    feed(pool, [second], [4], generator)
    feed(pool, [first], [4], generator)
    feed(pool, [first, second], [1, 1], generator)


def test_when_pages_run_out_nothing_has_changed():
    generator = torch.Generator().manual_seed(0)
    pool = poisoned(num_pages=4)
    a, b = Fed(pool), Fed(pool)
    feed(pool, [a, b], [20, 20], generator)
    before = pool.pool.stats().pages_used, pool.pool.length(a.handle)
    with pytest.raises(OutOfPages):
        pool.reserve([a.handle, b.handle], [1, 20])
    assert (pool.pool.stats().pages_used, pool.pool.length(a.handle)) == before
    feed(pool, [a, b], [1, 1], generator)


def test_a_mutated_scale_would_be_noticed():
    """The tolerance above bites: two percent of the scale shows."""
    rows = torch.randn(40, 288, generator=torch.Generator().manual_seed(0))
    right = attention(rows[:20], rows[20:])
    scaled = rows.clone()
    scaled[:, :96] *= 1.02
    wrong = attention(scaled[:20], scaled[20:])
    assert (right - wrong).abs().max() > 1e-3
