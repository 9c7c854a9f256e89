"""The paged cache on Triton against fp64: decode attention, moves of rows and pages, choice of a backend."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from paged_batches import Batch, attend, check_turns, contiguous, make_batch
from torch import Tensor

from bark_fast.ops import paged_kv
from bark_fast.ops import paged_kv_reference as fallback
from bark_fast.ops.dispatch import prefer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 2e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}
EDGES = [1, 15, 16, 17, 63, 64, 65, 129, 640, 1024]
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
if HAS_GPU:  # all of them, then, say what a GPU computes
    pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    """Every operation of this file runs Triton: interpreted on a CPU, compiled on a GPU."""
    pytest.importorskip("triton")
    from bark_fast.kernels.target import Target, assume

    # few processors to fill, so that the interpreter has few parts to go through
    with prefer("triton"), assume(Target(90, 40, 232_448)):
        yield


def bound(batch: Batch, truth: Tensor) -> float:
    """Twice what torch errs in the same dtype, and a rounding."""
    dtype = batch.qkv.dtype
    return 2 * float((attend(batch, dtype).double() - truth).abs().max()) + FLOOR[dtype]


def scratch_for(batch: Batch) -> tuple[Tensor, Tensor]:
    """Room to split contexts, full of NaN."""
    _, n_head, _, head_dim = batch.k_pages.shape
    partials, counters = paged_kv.attention_scratch(len(batch.qkv), n_head, head_dim, DEVICE)
    return partials.fill_(float("nan")), counters


def check(batch: Batch, split: bool = True, scale: float | None = None) -> None:
    """Attention of a batch, twice over one scratch, against fp64."""
    truth = attend(batch, torch.float64, scale)
    there = batch.to(DEVICE)
    scratch = scratch_for(batch) if split else None
    results = [
        paged_kv.paged_attention(*there.arguments(), there.out(), scale, scratch).cpu() for _ in range(2)
    ]
    error = float((results[0].double() - truth).abs().max())  # NaN, from a poisoned page, fails too
    assert error <= bound(batch, truth), error
    assert torch.equal(*results), "parts are joined in one order, and counters are at zero again"
    if scratch is not None:
        assert not scratch[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_attention_is_as_exact_as_torch(dtype: torch.dtype, split: bool) -> None:
    check(make_batch(EDGES, n_head=2, dtype=dtype, spread=2.0), split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(32, 16), (32, 64), (64, 32), (128, 16), (128, 64)])
def test_other_head_and_page_sizes(head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    check(make_batch([1, 17, 65, 130, 300], n_head=2, head_dim=head_dim, page_size=page_size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_query_rows_are_causal_bottom_right(dtype: torch.dtype) -> None:
    lengths, rows = [1, 3, 16, 65, 300], [1, 3, 5, 0, 4]
    check(make_batch(lengths, rows, n_head=2, dtype=dtype, pad=24))


def check_append(batch: Batch, split: bool) -> None:
    """append_attention, twice over one scratch, of a batch whose new rows are not in their pages yet."""
    after, slots = batch.split_off_new()
    truth = attend(after, torch.float64)
    scratch = scratch_for(batch) if split else None
    for _ in range(2):
        there = batch.to(DEVICE)
        pages, tables = (there.k_pages, there.v_pages), (there.block_table, there.lengths, there.query_starts)
        out = paged_kv.append_attention(
            there.qkv, *pages, *tables, slots.to(DEVICE), there.out(), scratch=scratch
        )
        assert float((out.cpu().double() - truth).abs().max()) <= bound(after, truth)
        for written, expected in zip(pages, (after.k_pages, after.v_pages), strict=True):
            assert torch.equal(written.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
        assert scratch is None or not scratch[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_new_rows_are_stored_and_seen(dtype: torch.dtype, split: bool) -> None:
    new = [1, 16, 17, 70, 300, 40, 33, 640], [1, 3, 1, 8, 5, 0, 1, 2]
    check_append(make_batch(*new, n_head=2, dtype=dtype, pad=24), split)


@pytest.mark.parametrize(("head_dim", "page_size"), [(32, 16), (32, 64), (128, 32)])
def test_new_rows_of_other_head_and_page_sizes(head_dim: int, page_size: int) -> None:
    new = [17, 90, 2], [1, 70, 4]  # more new rows than a tile; some before the first token
    check_append(make_batch(*new, n_head=2, head_dim=head_dim, page_size=page_size), True)


def test_more_sequences_than_are_searched_at_once() -> None:
    check(make_batch([1 + seq % 3 for seq in range(130)], n_head=1, head_dim=32), split=False)


@pytest.mark.skipif(HAS_GPU, reason="a GPU cannot be told how many processors it has")
def test_a_context_is_split_only_while_processors_are_idle() -> None:
    for size, n_head in ((4, 2), (41, 2)):
        batch = make_batch([130] * size, n_head=n_head, head_dim=32)
        scratch = scratch_for(batch)
        paged_kv.paged_attention(*batch.arguments(), batch.out(), scratch=scratch)
        assert bool(scratch[0].isnan().all()) == (size == 41)


@pytest.mark.parametrize("shortage", ["partials", "counters", "half"])
def test_scratch_that_is_too_small_means_fewer_parts(shortage: str) -> None:
    batch = make_batch([700, 300], n_head=2)
    there, truth = batch.to(DEVICE), attend(batch, torch.float64)
    partials, counters = scratch_for(batch)
    if shortage == "counters":
        counters = counters[:3]
    else:
        partials = partials[: 100 if shortage == "partials" else 3 * 4 * 66]
    out = paged_kv.paged_attention(*there.arguments(), there.out(), scratch=(partials, counters))
    assert float((out.cpu().double() - truth).abs().max()) <= bound(batch, truth)


def test_rows_without_keys_are_zero() -> None:
    batch = make_batch([0, 2, 5], [2, 4, 0], n_head=2)
    check(batch)
    there = batch.to(DEVICE)
    assert (paged_kv.paged_attention(*there.arguments(), there.out())[:4] == 0).all()


def test_sequences_may_share_pages() -> None:
    batch = make_batch([64, 50, 64], n_head=2)
    batch.block_table[1, :3] = batch.block_table[0, :3]
    batch.block_table[2] = batch.block_table[0]
    check(batch)


def test_nan_in_a_key_reaches_the_result() -> None:
    batch = make_batch([700, 40], n_head=4)
    batch.k_pages[int(batch.block_table[0, 1]), 3, 2] = float("nan")
    there = batch.to(DEVICE)
    for scratch in (None, scratch_for(batch)):
        out = paged_kv.paged_attention(*there.arguments(), there.out(), scratch=scratch).view(2, 4, 64)
        assert out[0, 3].isnan().all()
        assert not out[1].isnan().any() and not out[0, :3].isnan().any()


@pytest.mark.parametrize("entry", [-1, -(2**31), 10_000, 2**31 - 1])
def test_keys_on_pages_out_of_range_are_absent(entry: int) -> None:
    whole = make_batch([100, 40], n_head=2)
    cut = make_batch([100, 40], n_head=2)
    wrong = make_batch([100, 40], n_head=2)
    wrong.block_table[0, 0] = entry
    # without its first page the sequence is what is left of it: keys have no position in attention
    cut.block_table[0, :-1] = whole.block_table[0, 1:]
    cut.lengths[0] -= 16
    truth = attend(cut, torch.float64)
    there = wrong.to(DEVICE)
    for scratch in (None, scratch_for(wrong)):
        out = paged_kv.paged_attention(*there.arguments(), there.out(), scratch=scratch)
        assert float((out.cpu().double() - truth).abs().max()) <= bound(cut, truth)
    assert float((attend(whole, torch.float64) - truth).abs().max()) > bound(cut, truth)


def test_lengths_and_starts_that_are_wrong_reach_nothing_out_of_range() -> None:
    batch = make_batch([64, 20], [1, 2], n_head=2)
    batch.lengths[0] = 10_000  # the table has 64 places
    truth = attend(make_batch([64, 20], [1, 2], n_head=2), torch.float64)
    there = batch.to(DEVICE)
    out = paged_kv.paged_attention(*there.arguments(), there.out())
    assert float((out[0].cpu().double() - truth[0]).abs().max()) < 1e-6
    there.lengths[1] = -5
    assert (paged_kv.paged_attention(*there.arguments(), there.out())[1:] == 0).all()
    there.lengths[1] = 20
    for starts in ([0, 0, 0], [2, 2, 3], [-7, 0, 1], [5, 6, 7]):
        there.query_starts.copy_(torch.tensor(starts))
        out = paged_kv.paged_attention(*there.arguments(), there.out())
        assert out.isfinite().all() and (out[2] == 0).all() == (starts != [2, 2, 3])


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_tolerance_notices_a_mask_off_by_one(shift: int) -> None:
    batch = make_batch([129, 300], [8, 31], n_head=3, dtype=torch.bfloat16)
    truth = attend(batch, torch.float64)
    assert float((attend(batch, torch.float64, shift=shift) - truth).abs().max()) > bound(batch, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_notices_a_scale_off_by_two_percent(dtype: torch.dtype) -> None:
    batch = make_batch(EDGES, n_head=2, dtype=dtype, spread=2.0)
    truth, there = attend(batch, torch.float64), batch.to(DEVICE)
    broken = paged_kv.paged_attention(*there.arguments(), there.out(), 1.02 * 64**-0.5)
    assert float((broken.cpu().double() - truth).abs().max()) > bound(batch, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("page_size", "n_head"), [(16, 12), (32, 3), (64, 17)])
def test_append_writes_its_slots_and_nothing_else(dtype: torch.dtype, page_size: int, n_head: int) -> None:
    random = torch.Generator().manual_seed(1)
    width = n_head * 64
    qkv = torch.randn(50, 3 * width + 8, generator=random).to(dtype)[:, 8:]
    k_pages, v_pages = torch.randn(2, 9, n_head, page_size, 64, generator=random).to(dtype)
    slots = torch.randperm(9 * page_size, generator=random)[:50]
    slots[[7, 9, 30]] = torch.tensor([-1, 9 * page_size, 10**12])
    expected = k_pages.clone(), v_pages.clone()
    for row, slot in enumerate(slots.tolist()):
        for which, pages in enumerate(expected, start=1):
            if 0 <= slot < 9 * page_size:
                stored = qkv[row, which * width : (which + 1) * width].view(n_head, 64)
                pages[slot // page_size, :, slot % page_size] = stored
    there = [tensor.to(DEVICE) for tensor in (qkv, k_pages, v_pages, slots)]
    paged_kv.append_kv(*there)
    assert torch.equal(there[1].cpu(), expected[0])
    assert torch.equal(there[2].cpu(), expected[1])


def test_copies_of_pages_are_carried_out_in_order() -> None:
    k_pages, v_pages = torch.randn(2, 9, 3, 16, 64)
    expected = k_pages.clone(), v_pages.clone()
    pairs = torch.tensor([[0, 1], [1, 2], [5, 5], [0, 9], [-1, 3], [2, 8]], dtype=torch.int32)
    for source, destination in pairs.tolist():
        for pages in expected:
            if source >= 0 and destination < 9:
                pages[destination] = pages[source]
    k_there, v_there = k_pages.to(DEVICE), v_pages.to(DEVICE)
    paged_kv.copy_pages(k_there, v_there, pairs.to(DEVICE))
    assert torch.equal(k_there.cpu(), expected[0])
    assert torch.equal(v_there.cpu(), expected[1])


@pytest.mark.parametrize("length", [0, 1, 16, 17, 100])
def test_gather_gives_a_sequence_in_order(length: int) -> None:
    batch = make_batch([length], n_head=3, dtype=torch.float16)
    there = batch.to(DEVICE)
    out = paged_kv.gather_kv(there.v_pages, there.block_table[0], length)
    assert torch.equal(out.cpu(), contiguous(batch.v_pages, batch.block_table[0], length))
    if length > 16:
        there.block_table[0, 1] = 10_000
        out = paged_kv.gather_kv(there.v_pages, there.block_table[0], length)
        assert (out[:, 16:32] == 0).all() and (out[:, :16] != 0).any()


def test_nothing_to_do() -> None:
    batch = make_batch([20], [0], n_head=2)
    there = batch.to(DEVICE)
    assert paged_kv.paged_attention(*there.arguments(), there.out()).shape == (0, 128)
    paged_kv.append_kv(there.qkv, there.k_pages, there.v_pages, torch.zeros(0, dtype=torch.int64).to(DEVICE))
    paged_kv.copy_pages(there.k_pages, there.v_pages, torch.zeros(0, 2, dtype=torch.int32).to(DEVICE))
    for mine, theirs in ((there.k_pages, batch.k_pages), (there.v_pages, batch.v_pages)):
        assert torch.equal(mine.cpu().nan_to_num(), theirs.nan_to_num())


def test_wrong_shapes_and_dtypes_are_named() -> None:
    there = make_batch([20, 60], [1, 3], n_head=2).to(DEVICE)
    query, k, v, table, lengths, starts = there.arguments()
    call = partial(paged_kv.paged_attention, query, k, v)
    with pytest.raises(ValueError, match=r"block_table is torch\.int64; expected torch\.int32"):
        call(table.long(), lengths, starts, there.out())
    with pytest.raises(ValueError, match=r"lengths has shape \(1,\); expected \(2,\)"):
        call(table, lengths[:1], starts, there.out())
    with pytest.raises(ValueError, match=r"out has shape \(3, 128\); expected \(4, 128\)"):
        call(table, lengths, starts, there.out()[:3])
    with pytest.raises(ValueError, match=r"slots is torch\.int32; expected torch\.int64"):
        paged_kv.append_kv(there.qkv, k, v, starts.new_zeros(4))
    with pytest.raises(ValueError, match="length is 65; expected"):
        paged_kv.gather_kv(k, table[1], 65)


def test_prefer_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from bark_fast.kernels import paged_kv as kernels

    ran = []
    real = {module: module.gather_kv for module in (fallback, kernels)}
    for module, name in ((fallback, "torch"), (kernels, "triton")):
        monkeypatch.setattr(module, "gather_kv", lambda *a, m=module, n=name: (ran.append(n), real[m](*a))[1])
    there = make_batch([20], n_head=2).to(DEVICE)
    for backend in ("triton", "torch", "auto"):
        with prefer(backend):  # type: ignore[arg-type]
            paged_kv.gather_kv(there.k_pages, there.block_table[0], 20)
    automatic = [] if paged_kv.compiled(0 if HAS_GPU else None) else ["triton" if HAS_GPU else "torch"]
    assert ran == ["triton", "torch", *automatic]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_head", [12, 16])
def test_gpu_batches_of_production(n_head: int, dtype: torch.dtype) -> None:
    for size in (1, 8, 64):
        check(make_batch([1 + 371 * (seq + 1) % 1024 for seq in range(size)], n_head=n_head, dtype=dtype))


@pytest.mark.gpu
def test_gpu_many_launches_over_one_scratch_agree() -> None:
    batch = make_batch([1024, 5, 700], n_head=12).to("cuda")
    scratch = scratch_for(batch)
    first = paged_kv.paged_attention(*batch.arguments(), batch.out(), scratch=scratch).clone()
    for _ in range(500):
        again = paged_kv.paged_attention(*batch.arguments(), batch.out(), scratch=scratch)
        assert torch.equal(again, first)
    assert not scratch[1].any()


def test_launches_that_take_turns_join_their_own_parts() -> None:
    scratch = scratch_for(make_batch([1024], n_head=12))
    check_turns(
        lambda batch, out: paged_kv.paged_attention(*batch.arguments(), out, scratch=scratch), scratch[1]
    )


@pytest.mark.gpu
def test_gpu_calls_can_be_captured_and_replayed_with_other_lengths() -> None:
    batch = make_batch([1000], n_head=12).to("cuda")
    out, scratch = batch.out(), scratch_for(batch)
    slots = torch.tensor([-1], device="cuda")

    def step() -> None:
        paged_kv.append_kv(batch.qkv, batch.k_pages, batch.v_pages, slots)
        paged_kv.paged_attention(*batch.arguments(), out, scratch=scratch)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for length in (1000, 17, 513):
        batch.lengths.fill_(length)
        graph.replay()
        truth = attend(batch.to("cpu"), torch.float64)
        assert float((out.cpu().double() - truth).abs().max()) < 1e-5
