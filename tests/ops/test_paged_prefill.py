"""Ragged prefill over a paged cache against fp64, on every backend at hand."""

from __future__ import annotations

import pytest
import torch
from paged_batches import Batch, attend, make_batch
from torch import Tensor

from bark_fast.ops import paged_kv_reference as reference
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.paged_prefill import paged_prefill

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 3e-7, torch.float16: 2e-4, torch.bfloat16: 2e-3}
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
if HAS_GPU:  # all of them, then, say what a GPU computes
    pytestmark = pytest.mark.gpu
RAGGED = ([1, 16, 17, 70, 100, 40], [1, 16, 5, 70, 33, 0])
"""(tokens, new ones among them): nothing cached, a page, a page and more, and no new rows."""


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Torch, and Triton (interpreted on a CPU)."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def run(batch: Batch, slots: Tensor, backend: str, max_queries: int | None = None) -> tuple[Tensor, Batch]:
    """Prefill on DEVICE: the result, and the batch with its pages, on the CPU again."""
    there = batch.to(DEVICE)
    tables = there.block_table, there.lengths, there.query_starts
    out = there.out()
    with prefer(backend):  # type: ignore[arg-type]
        paged_prefill(
            there.qkv, there.k_pages, there.v_pages, *tables, slots.to(DEVICE), out, max_queries=max_queries
        )
    return out.cpu(), there.to("cpu")


def check(batch: Batch, backend: str, max_queries: int | None = None) -> None:
    after, slots = batch.split_off_new()
    truth = attend(after, torch.float64)
    dtype = batch.qkv.dtype
    bound = 2 * float((attend(after, dtype).double() - truth).abs().max()) + FLOOR[dtype]
    out, got = run(batch, slots, backend, max_queries)
    assert float((out.double() - truth).abs().max()) <= bound
    for mine, theirs in ((got.k_pages, after.k_pages), (got.v_pages, after.v_pages)):
        assert torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(mine.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_queries", [None, 70])
def test_as_exact_as_torch(backend: str, dtype: torch.dtype, max_queries: int | None) -> None:
    check(make_batch(*RAGGED, n_head=2, dtype=dtype, spread=2.0, pad=8), backend, max_queries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(32, 32), (64, 64), (128, 16)])
def test_other_head_and_page_sizes(backend: str, head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    batch = make_batch([65, 130], [65, 3], n_head=1, head_dim=head_dim, page_size=page_size, dtype=dtype)
    check(batch, backend)


@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_large_blocks(dtype: torch.dtype, processors: int) -> None:
    pytest.importorskip("triton")
    from bark_fast.kernels.target import Target, assume

    with assume(Target(90, processors, 232_448)):
        check(make_batch([150, 63], [129, 63], n_head=1, dtype=dtype), "triton")


def test_rows_before_the_first_token_are_zero_and_no_keys(backend: str) -> None:
    batch = make_batch([0, 2, 40], [2, 4, 70], n_head=2)
    check(batch, backend)
    _, slots = batch.split_off_new()
    out, _ = run(batch, slots, backend)
    assert (out[:4] == 0).all() and (out[6:36] == 0).all() and (out[36] != 0).any()


def test_new_keys_come_from_the_projection_whatever_their_slots(backend: str) -> None:
    batch = make_batch([40, 20], [8, 20], n_head=2)
    after, slots = batch.split_off_new()
    slots[[2, 12]] = -1
    out, got = run(batch, slots, backend)
    assert float((out.double() - attend(after, torch.float64)).abs().max()) < 1e-5
    reference.append_kv(batch.qkv, batch.k_pages, batch.v_pages, slots)
    assert torch.equal(got.k_pages.nan_to_num(), batch.k_pages.nan_to_num())


@pytest.mark.parametrize("change", ["a mask off by one", "a page mistaken", "two percent of scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_tolerance_notices(change: str, dtype: torch.dtype) -> None:
    batch = make_batch(*RAGGED, n_head=2, dtype=dtype, spread=2.0)
    after, _ = batch.split_off_new()
    truth = attend(after, torch.float64)
    bound = 2 * float((attend(after, dtype).double() - truth).abs().max()) + FLOOR[dtype]
    if change == "a page mistaken":
        after.block_table[2, 0] = after.block_table[4, 0]
    shift, scale = int(change == "a mask off by one"), 1.02 / 8 if change == "two percent of scale" else None
    assert float((attend(after, torch.float64, scale, -shift) - truth).abs().max()) > bound


def test_what_is_out_of_range_is_absent_and_not_followed() -> None:
    pytest.importorskip("triton")
    batch = make_batch([100, 40], [4, 40], n_head=2)
    after, slots = batch.split_off_new()
    cut = Batch(**{name: value.clone() for name, value in vars(after).items()})
    cut.block_table[0, :-1] = after.block_table[0, 1:]
    cut.lengths[0] -= 16
    batch.block_table[0, 0] = 10_000
    slots[[1, 5]] = torch.tensor([10**12, -7])
    out, got = run(batch, slots, "triton")
    assert float((out.double() - attend(cut, torch.float64)).abs().max()) < 1e-5
    reference.append_kv(batch.qkv, batch.k_pages, batch.v_pages, slots.where(slots < 10**6, -1).clamp(min=-1))
    assert torch.equal(got.k_pages.nan_to_num(), batch.k_pages.nan_to_num())
    batch.lengths[1] = 10_000  # places beyond the table do not exist; the rows' own keys still do
    assert run(batch, slots, "triton")[0].shape == out.shape
    batch.query_starts.copy_(torch.tensor([-3, 50, 99]))
    assert run(batch, slots, "triton")[0].isnan().all(), "rows of no sequence are left alone"


def test_wrong_arguments_are_named(backend: str) -> None:
    batch = make_batch([20, 60], [1, 3], n_head=2).to(DEVICE)
    slots = batch.new_slots().to(DEVICE)
    tables = batch.block_table, batch.lengths, batch.query_starts
    pages = batch.k_pages, batch.v_pages
    with prefer(backend):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"slots is torch\.int32; expected torch\.int64"):
            paged_prefill(batch.qkv, *pages, *tables, slots.int(), batch.out())
        with pytest.raises(ValueError, match=r"out has shape \(3, 128\); expected \(4, 128\)"):
            paged_prefill(batch.qkv, *pages, *tables, slots, batch.out()[:3])
        with pytest.raises(ValueError, match="scale is -1"):
            paged_prefill(batch.qkv, *pages, *tables, slots, batch.out(), -1.0)
        with pytest.raises(ValueError, match="max_queries is 0; expected the rows of the longest sequence"):
            paged_prefill(batch.qkv, *pages, *tables, slots, batch.out(), max_queries=0)
    with prefer("torch"), pytest.raises(ValueError, match="max_queries is 2; sequence 1 has 3 rows"):
        paged_prefill(batch.qkv, *pages, *tables, slots, batch.out(), max_queries=2)


def test_no_rows(backend: str) -> None:
    batch = make_batch([20], [0], n_head=2)
    assert run(batch, batch.new_slots(), backend)[0].shape == (0, 128)


def test_the_operator_passes_opcheck_and_traces() -> None:
    batch = make_batch([20, 60], [20, 3], n_head=2)
    _, slots = batch.split_off_new()
    pages = [pages.nan_to_num() for pages in (batch.k_pages, batch.v_pages)]
    tables = batch.block_table, batch.lengths, batch.query_starts
    arguments = (batch.qkv, *pages, *tables, slots, torch.zeros(23, 128), 0.125, 20)
    torch.library.opcheck(torch.ops.bark_fast.paged_prefill.default, arguments)

    def step(qkv: Tensor, out: Tensor) -> Tensor:
        return paged_prefill(qkv, *pages, *tables, slots, out) * 2

    expected = step(batch.qkv, batch.out())
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)(batch.qkv, batch.out())
    assert torch.equal(traced, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_head", [12, 16])
def test_gpu_prompts_of_production(n_head: int, dtype: torch.dtype) -> None:
    for lengths, rows in (([257], [257]), ([887], [887]), ([946, 257, 70, 630], [60, 257, 9, 100])):
        check(make_batch(lengths, rows, n_head=n_head, dtype=dtype), "triton", max(rows))


def test_a_captured_prefill_is_right_for_other_lengths() -> None:
    pytest.importorskip("triton")
    batch = make_batch([100, 70], [40, 30], n_head=2)
    _, slots = batch.split_off_new()
    there, out, where = batch.to(DEVICE), batch.to(DEVICE).out(), slots.to(DEVICE)
    tables = there.block_table, there.lengths, there.query_starts

    def step() -> None:
        with prefer("triton"):
            paged_prefill(there.qkv, there.k_pages, there.v_pages, *tables, where, out, max_queries=60)

    step()  # compiles
    replay = step  # without a GPU the same calls, uncaptured
    if HAS_GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    for lengths, starts in (([100, 70], [0, 40, 70]), ([90, 68], [0, 10, 70])):
        there.lengths.copy_(torch.tensor(lengths))
        there.query_starts.copy_(torch.tensor(starts))
        after, slots = there.to("cpu").split_off_new()
        where.copy_(slots)
        replay()
        assert float((out.cpu().double() - attend(after, torch.float64)).abs().max()) < 1e-5
