"""The paged key-value cache: every operation against fp64, on every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from paged_batches import Batch, attend, check_turns, contiguous, make_batch
from simulated_cuda import OnCuda, simulated_cuda, why_not
from torch import Tensor

from bark_fast import extension
from bark_fast.ops import paged_kv
from bark_fast.ops import paged_kv_reference as fallback

C = extension.load()
ISAS = C.isas() if C is not None else []
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 2e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}
"""About one rounding of the output: where torch happens to be exact, nobody else has to be."""
EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 640, 1023, 1024]

needs_compiled = pytest.mark.skipif(C is None, reason=f"bark_fast._C is missing: {extension.why_not()}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=[*ISAS, "plain torch", "simulated CUDA"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every way this machine can compute, one after another."""
    if request.param == "plain torch":
        monkeypatch.setattr(paged_kv, "compiled", lambda cuda: None)
        yield request.param
    elif request.param == "simulated CUDA":
        if why_not():
            pytest.skip(why_not())
        monkeypatch.setattr(paged_kv, "compiled", lambda cuda: simulated_cuda())
        yield request.param
    else:
        before = C.isa()
        C.use_isa(request.param)
        yield request.param
        C.use_isa(before)


def bound(batch: Batch, truth: Tensor) -> float:
    """Twice what torch errs in the same dtype, and a rounding."""
    dtype = batch.qkv.dtype
    return 2 * float((attend(batch, dtype).double() - truth).abs().max()) + FLOOR[dtype]


def check(batch: Batch, scale: float | None = None) -> None:
    out = paged_kv.paged_attention(*batch.arguments(), batch.out(), scale)
    truth = attend(batch, torch.float64, scale)
    error = float((out.double() - truth).abs().max())  # NaN, from a poisoned page, fails too
    assert error <= bound(batch, truth), error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_attention_is_as_exact_as_torch(isa: str, dtype: torch.dtype, head_dim: int, page_size: int) -> None:
    check(make_batch(EDGES, n_head=2, head_dim=head_dim, page_size=page_size, dtype=dtype, spread=2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_head", [12, 16])
def test_several_query_rows_are_causal_bottom_right(isa: str, dtype: torch.dtype, n_head: int) -> None:
    lengths = [1, 3, 16, 17, 65, 129, 300]
    check(make_batch(lengths, [1, 3, 9, 2, 65, 8, 31], n_head=n_head, dtype=dtype, pad=24))


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_batches_of_one_to_sixty_four(isa: str, size: int) -> None:
    check(make_batch([1 + 37 * seq % 200 for seq in range(size)], dtype=torch.bfloat16))


RAGGED = [1 + 331 * seq % 1024 for seq in range(62)] + [1023, 1024]
"""64 lengths all over 1 to 1,024."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixty_four_lengths_up_to_the_longest(isa: str, dtype: torch.dtype) -> None:
    batch = make_batch(RAGGED, [1 + seq % 3 for seq in range(64)], n_head=2, dtype=dtype)
    batch.block_table[5, : 1 + RAGGED[5] // 16] = batch.block_table[63, : 1 + RAGGED[5] // 16]  # shared pages
    check(batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_rows_of_sixty_four_sequences_are_stored_and_seen(isa: str, dtype: torch.dtype) -> None:
    check_append(
        make_batch(RAGGED, [min(1 + seq % 3, RAGGED[seq]) for seq in range(64)], n_head=2, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_and_results_may_be_parts_of_wider_ones(isa: str, dtype: torch.dtype) -> None:
    """Rows of a table and of the results that lie apart, as the engine's slices of a batch do."""
    batch = make_batch(*NEW, dtype=dtype)
    after, slots = batch.split_off_new()
    truth = attend(after, torch.float64)
    table = torch.full((10, batch.block_table.shape[1] + 5), 10_000, dtype=torch.int32)
    table[1:9, :-5] = batch.block_table
    padded = torch.full((len(truth) + 2, truth.shape[1] + 64), 7.0, dtype=dtype)
    spread = torch.full((2, len(slots) + 3), -7)
    spread[1, 1:-2] = slots
    out = padded[1:-1, 24:-40]
    pages, starts = (batch.k_pages, batch.v_pages), batch.query_starts
    for _ in range(2):  # stored by the first, there for the second
        paged_kv.append_attention(
            batch.qkv, *pages, table[1:9, :-5], batch.lengths, starts, spread[1, 1:-2], out
        )
        assert float((out.double() - truth).abs().max()) <= bound(after, truth)
        out.fill_(torch.nan)
    paged_kv.paged_attention(batch.query, *pages, table[1:9, :-5], batch.lengths, starts, out)
    assert float((out.double() - truth).abs().max()) <= bound(after, truth)
    padded[1:-1, 24:-40] = 7.0
    assert (padded == 7.0).all()  # nothing beside the results was written


def test_a_long_context_is_split_over_many_threads() -> None:
    batch = make_batch([1024, 5], [3, 1], n_head=2)
    truth = attend(batch, torch.float64)
    for threads in (1, 2, 3, 16, 61):
        if C is not None:
            out = batch.out()
            C.paged_attention(*batch.arguments(), out, 0.125, None, None, threads, 0)
            assert float((out.double() - truth).abs().max()) <= bound(batch, truth)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_how_memory_is_read_changes_no_bit(dtype: torch.dtype, cpu_kinds: Iterator[str]) -> None:
    batch = make_batch(EDGES, n_head=2, dtype=dtype)
    results = [paged_kv.paged_attention(*batch.arguments(), batch.out()) for _ in cpu_kinds]
    assert len(results) == 3 and all(torch.equal(results[0], other) for other in results[1:])


@needs_compiled
def test_own_threads_compute_what_openmp_does() -> None:
    batch = make_batch([700, 64, 257], n_head=12)
    expected = paged_kv.paged_attention(*batch.arguments(), batch.out())
    C.avoid_openmp(True)
    try:
        assert C.parallel_backend() == "threads"
        for threads in (2, 5):
            out = batch.out()
            C.paged_attention(*batch.arguments(), out, 0.125, None, None, threads, 0)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    finally:
        C.avoid_openmp(False)


@needs_compiled
def test_calls_from_several_python_threads_do_not_disturb_one_another() -> None:
    batches = [make_batch([300 + 50 * seed, 64], [3, 1], seed=seed) for seed in range(4)]
    expected = [paged_kv.paged_attention(*batch.arguments(), batch.out()) for batch in batches]

    def often(which: int) -> bool:
        batch = batches[which % 4]
        results = [paged_kv.paged_attention(*batch.arguments(), batch.out()) for _ in range(20)]
        return all(torch.allclose(result, expected[which % 4], atol=1e-6) for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, range(8)))


NEW = ([1, 16, 17, 70, 300, 40, 33, 640], [1, 3, 1, 8, 5, 0, 1, 2])
"""(tokens, new ones among them): nothing cached, page boundaries, no new rows."""


def check_append(batch: Batch, device: str = "cpu", scratch: tuple[Tensor, Tensor] | None = None) -> None:
    """append_attention of a batch whose new rows are not in their pages yet."""
    after, slots = batch.split_off_new()
    there, truth = batch.to(device), attend(after, torch.float64)
    pages = there.k_pages, there.v_pages
    tables = there.block_table, there.lengths, there.query_starts
    out = paged_kv.append_attention(there.qkv, *pages, *tables, slots.to(device), there.out(), scratch=scratch)
    assert float((out.cpu().double() - truth).abs().max()) <= bound(after, truth)
    for written, expected in zip(pages, (after.k_pages, after.v_pages), strict=True):
        assert torch.equal(written.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_new_rows_are_stored_and_seen(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    check_append(make_batch(*NEW, n_head=2, head_dim=head_dim, dtype=dtype, pad=24))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("head_dim", [8, 24, 256])
def test_heads_of_other_sizes_run_on_torch(device: str, head_dim: int) -> None:
    batch = make_batch(*NEW, n_head=2, head_dim=head_dim)
    check_append(batch, device)
    there = batch.to(device)
    table, length = there.block_table[4], int(batch.lengths[4])
    expected = contiguous(batch.k_pages, batch.block_table[4], length)
    assert torch.equal(
        paged_kv.gather_kv(there.k_pages, table, length).cpu().nan_to_num(), expected.nan_to_num()
    )
    pair = torch.tensor([[int(batch.block_table[4, 0]), 0]], dtype=torch.int32)
    paged_kv.copy_pages(there.k_pages, there.v_pages, pair.to(device))
    assert torch.equal(there.k_pages[0], there.k_pages[pair[0, 0]])


def test_new_rows_before_the_first_token_are_ignored(isa: str) -> None:
    check_append(make_batch([0, 2, 5, 1], [2, 4, 0, 1], n_head=2))


def test_the_tolerance_notices_a_new_key_left_out() -> None:
    batch = make_batch(*NEW, n_head=2, dtype=torch.bfloat16)
    after, _ = batch.split_off_new()
    truth = attend(after, torch.float64)
    without = attend(after, torch.float64, shift=-1).nan_to_num()
    assert float((without - truth).abs().max()) > bound(after, truth)


def test_append_attention_refuses_before_it_writes(isa: str) -> None:
    if isa == "simulated CUDA":
        pytest.skip("CUDA skips what is out of range: its tables lie on the device")
    batch = make_batch([20, 60], [1, 3])
    _, slots = batch.split_off_new()
    before, out = batch.k_pages.clone(), torch.full_like(batch.out(), 7.0)
    names = ("qkv", "k_pages", "v_pages", "block_table", "lengths", "query_starts")
    good = {name: getattr(batch, name) for name in names} | {"slots": slots, "out": out}
    bad = {
        r"slots\[1\] is 10000; ": {"slots": with_entry(slots, (1,), 10_000)},
        r"block_table\[\d+\] is 99; ": {"block_table": with_entry(batch.block_table, (1, 2), 99)},
        r"lengths\[0\] is -1; ": {"lengths": with_entry(batch.lengths, (0,), -1)},
        "slots (is|has)": {"slots": slots.int()},
        "qkv has shape": {"qkv": batch.qkv[:, 1:]},
        "out (is|has)": {"out": out[:3]},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            paged_kv.append_attention(**(good | change))
    assert (out == 7).all() and torch.equal(batch.k_pages.nan_to_num(), before.nan_to_num())


def test_rows_without_keys_are_zero(isa: str) -> None:
    batch = make_batch([0, 2, 5], [2, 4, 0])
    out = paged_kv.paged_attention(*batch.arguments(), batch.out())
    assert (out[:4] == 0).all()
    assert torch.allclose(out.double(), attend(batch, torch.float64), atol=1e-6)


def test_sequences_may_share_pages(isa: str) -> None:
    batch = make_batch([64, 50, 64])
    batch.block_table[1, :3] = batch.block_table[0, :3]
    batch.block_table[2] = batch.block_table[0]
    check(batch)


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_tolerance_notices_a_mask_off_by_one(shift: int) -> None:
    batch = make_batch([129, 300], [8, 31], dtype=torch.bfloat16)
    truth = attend(batch, torch.float64)
    assert float((attend(batch, torch.float64, shift=shift) - truth).abs().max()) > bound(batch, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_notices_a_scale_off_by_two_percent(dtype: torch.dtype) -> None:
    batch = make_batch(EDGES, n_head=2, dtype=dtype, spread=2.0)
    truth = attend(batch, torch.float64)
    broken = paged_kv.paged_attention(*batch.arguments(), batch.out(), 1.02 * 64**-0.5)
    assert float((broken.double() - truth).abs().max()) > bound(batch, truth)


def test_the_tolerance_notices_a_wrong_page() -> None:
    batch = make_batch([1024, 1024], dtype=torch.bfloat16)
    truth = attend(batch, torch.float64)
    limit = bound(batch, truth)
    batch.block_table[0, 40] = batch.block_table[1, 40]
    broken = paged_kv.paged_attention(*batch.arguments(), batch.out())
    assert float((broken.double() - truth).abs().max()) > limit


def test_nan_in_a_key_reaches_the_result(isa: str) -> None:
    batch = make_batch([40, 40])
    batch.k_pages[int(batch.block_table[0, 1]), 3, 2] = float("nan")
    out = paged_kv.paged_attention(*batch.arguments(), batch.out()).view(2, 12, 64)
    assert out[0, 3].isnan().all()
    assert not out[1].isnan().any()
    assert not out[0, 4:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_append_writes_its_slots_and_nothing_else(isa: str, dtype: torch.dtype, page_size: int) -> None:
    random = torch.Generator().manual_seed(1)
    qkv = torch.randn(50, 3 * 12 * 64 + 8, generator=random).to(dtype)[:, 8:]
    k_pages, v_pages = torch.randn(2, 9, 12, page_size, 64, generator=random).to(dtype)
    slots = torch.randperm(9 * page_size, generator=random)[:50]
    slots[7] = -1
    expected = k_pages.clone(), v_pages.clone()
    for row, slot in enumerate(slots.tolist()):
        for which, pages in enumerate(expected):
            if slot >= 0:
                start = (which + 1) * 12 * 64
                pages[slot // page_size, :, slot % page_size] = qkv[row, start : start + 768].view(12, 64)
    paged_kv.append_kv(qkv, k_pages, v_pages, slots)
    assert torch.equal(k_pages, expected[0])
    assert torch.equal(v_pages, expected[1])


def test_copies_of_pages_are_carried_out_in_order(isa: str) -> None:
    k_pages, v_pages = torch.randn(2, 9, 12, 16, 64)
    expected = k_pages.clone(), v_pages.clone()
    pairs = torch.tensor([[0, 1], [1, 2], [5, 5], [2, 8]], dtype=torch.int32)
    for source, destination in pairs.tolist():
        for pages in expected:
            pages[destination] = pages[source]
    paged_kv.copy_pages(k_pages, v_pages, pairs)
    assert torch.equal(k_pages, expected[0])
    assert torch.equal(v_pages, expected[1])


@pytest.mark.parametrize("length", [0, 1, 16, 17, 100])
def test_gather_gives_a_sequence_in_order(isa: str, length: int) -> None:
    batch = make_batch([length], dtype=torch.float16)
    out = paged_kv.gather_kv(batch.v_pages, batch.block_table[0], length)
    assert torch.equal(out, contiguous(batch.v_pages, batch.block_table[0], length))


def test_swap_copies_between_caches(isa: str) -> None:
    source, destination = torch.randn(4, 12, 16, 64), torch.zeros(7, 12, 16, 64)
    paged_kv.swap_pages(source, destination, torch.tensor([[3, 0], [1, 6]], dtype=torch.int32))
    assert torch.equal(destination[0], source[3])
    assert torch.equal(destination[6], source[1])
    assert not destination[1:6].any()


def with_entry(tensor: Tensor, index: tuple[int, ...], value: int) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


BAD_ATTENTION = {
    "query is float16": ("query", lambda t: t.half()),
    "query has stride": ("query", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "query has shape": ("query", lambda t: t[:, :5]),
    r"v_pages is bfloat16": ("v_pages", lambda t: t.bfloat16()),
    "v_pages has shape": ("v_pages", lambda t: t[1:]),
    "k_pages has stride": ("k_pages", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "k_pages has page_size 8": ("k_pages", lambda t: t[:, :, :8].contiguous()),
    "block_table is int64": ("block_table", lambda t: t.long()),
    "block_table has stride": ("block_table", lambda t: t.T.contiguous().T),
    r"block_table\[6\] is 99; .*\[0, 9\)": ("block_table", lambda t: with_entry(t, (1, 2), 99)),
    r"block_table\[0\] is -1; ": ("block_table", lambda t: with_entry(t, (0, 0), -1)),
    r"lengths\[1\] is 65; .*\[0, 65\)": ("lengths", lambda t: with_entry(t, (1,), 65)),
    r"lengths\[0\] is -3; ": ("lengths", lambda t: with_entry(t, (0,), -3)),
    r"lengths has shape \(1,\); .*\(2,\)": ("lengths", lambda t: t[:1]),
    r"query_starts\[0\] is 1; ": ("query_starts", lambda t: with_entry(t, (0,), 1)),
    r"query_starts\[1\] is 7; ": ("query_starts", lambda t: with_entry(t, (1,), 7)),
    r"query_starts\[2\] is 1; ": ("query_starts", lambda t: with_entry(t, (2,), 1)),
    "out has shape": ("out", lambda t: t[:-1]),
    "out has row stride 0": ("out", lambda t: t[:1].expand(4, -1)),
    "out is float64|out has an unsupported dtype": ("out", lambda t: t.double()),
}


@needs_compiled
@pytest.mark.parametrize("message", BAD_ATTENTION)
def test_attention_refuses_before_it_writes(message: str) -> None:
    batch = make_batch([20, 60], [1, 3])
    names = ("query", "k_pages", "v_pages", "block_table", "lengths", "query_starts", "out")
    arguments = dict(zip(names, (*batch.arguments(), torch.full((4, 768), 7.0)), strict=True))
    wrong, change = BAD_ATTENTION[message]
    arguments[wrong] = change(arguments[wrong])
    with pytest.raises(ValueError, match=message):
        paged_kv.paged_attention(**arguments)
    assert (arguments["out"] == 7).all()


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "it compiles")
@pytest.mark.parametrize(
    "stray", ["v_pages", "block_table", "lengths", "query_starts", "out", "slots", "query"]
)
def test_a_tensor_on_another_device_is_refused_before_anything_is_written(stray: str) -> None:
    module = simulated_cuda().module
    batch = make_batch([20, 60], [1, 3])
    before, out = batch.k_pages.clone(), torch.full((4, 768), 7.0)
    names = ("query", "k_pages", "v_pages", "block_table", "lengths", "query_starts")
    tensors = dict(zip(names, batch.arguments(), strict=True)) | {"out": out, "qkv": batch.qkv}
    tensors["slots"] = batch.new_slots()
    wrong = {"query": ("query", "qkv")}.get(stray, (stray,))
    for home, message in (("cuda:0", "is on cpu; expected cuda:0 as k_pages"),
                          ("cpu", "is on cuda:0; expected cpu as k_pages")):  # fmt: skip
        there = {
            name: OnCuda(one) if (home == "cuda:0") != (name in wrong) else one for name, one in tensors.items()
        }
        attended = [there[name] for name in (*names, "out")]
        appended = [there[name] for name in ("qkv", *names[1:], "slots", "out")]
        if stray != "slots":
            with pytest.raises(ValueError, match=f"{stray} {message}"):
                module.paged_attention(*attended, 0.125, None, None, 1, 0)
        with pytest.raises(ValueError, match=f"{wrong[-1]} {message}"):
            module.append_attention(*appended, 0.125, None, None, 1, 0)
        if stray in ("v_pages", "slots", "query"):
            with pytest.raises(ValueError, match=f"{wrong[-1]} {message}"):
                module.append_kv(*(there[name] for name in ("qkv", "k_pages", "v_pages", "slots")), 1, 0)
    pairs, (k_pages, table) = torch.tensor([[0, 1]], dtype=torch.int32), (batch.k_pages, batch.block_table[0])
    with pytest.raises(ValueError, match="pairs is on cpu; expected cuda:0"):
        module.copy_pages(OnCuda(k_pages), OnCuda(batch.v_pages), pairs, 1, 0)
    with pytest.raises(ValueError, match="block_table is on cpu; expected cuda:0"):
        module.gather_kv(OnCuda(k_pages), table, 20, OnCuda(torch.zeros(12, 20, 64)), 1, 0)
    with pytest.raises(ValueError, match="pairs is on cuda; expected cpu"):
        module.swap_pages(OnCuda(k_pages), k_pages.clone(), OnCuda(pairs), 1, 0)
    assert (out == 7).all() and torch.equal(k_pages.nan_to_num(), before.nan_to_num())


def test_append_and_copies_refuse_before_they_write(isa: str) -> None:
    if isa == "simulated CUDA":
        pytest.skip("CUDA skips what is out of range: its tables lie on the device")
    qkv = torch.randn(3, 3 * 12 * 64)
    k_pages, v_pages = torch.randn(2, 4, 12, 16, 64)
    before = k_pages.clone(), v_pages.clone()
    for slots in ([0, 1, 64], [5, -2, 3], [1, 2, 2**62]):
        with pytest.raises(ValueError, match=r"slots\[\d\] is .*; expected a value in \[-1, 64\)"):
            paged_kv.append_kv(qkv, k_pages, v_pages, torch.tensor(slots))
    with pytest.raises(ValueError, match="qkv has shape"):
        paged_kv.append_kv(qkv[:, 1:], k_pages, v_pages, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="slots is"):
        paged_kv.append_kv(qkv, k_pages, v_pages, torch.tensor([1, 2, 3]).int())
    for pairs in ([[0, 1], [0, 4]], [[0, 1], [-1, 2]]):
        wrong = torch.tensor(pairs, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"pairs\[\d\] is .*; expected a value in \[0, 4\)"):
            paged_kv.copy_pages(k_pages, v_pages, wrong)
        with pytest.raises(ValueError, match="pairs"):
            paged_kv.swap_pages(k_pages, v_pages, wrong)
    within = torch.tensor([[0, 1], [0, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"v_pages has shape \(3, "):
        paged_kv.copy_pages(k_pages, v_pages[:3], within)
    with pytest.raises(ValueError, match=r"v_pages is (torch\.)?float16"):
        paged_kv.copy_pages(k_pages, v_pages.half(), within)
    across = torch.tensor([[0, 3]], dtype=torch.int32)  # each cache has its own number of pages
    with pytest.raises(ValueError, match="3"):
        paged_kv.swap_pages(k_pages, v_pages[:3], across)
    with pytest.raises(ValueError, match="3"):
        paged_kv.swap_pages(k_pages[:3], v_pages, across.flip(1))
    table = torch.tensor([0, 4], dtype=torch.int32)
    out = torch.full((12, 20, 64), 7.0)
    with pytest.raises(ValueError, match=r"block_table\[1\] is 4; "):
        paged_kv.gather_kv(k_pages, table, 20, out)
    with pytest.raises(ValueError, match=r"length is 33; "):
        paged_kv.gather_kv(k_pages, table, 33, out)
    assert (out == 7).all()
    assert torch.equal(k_pages, before[0])
    assert torch.equal(v_pages, before[1])


@needs_compiled
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_rows_without_a_sequence_are_refused(device: str) -> None:
    batch = make_batch([20]).to(device)
    none = batch.block_table[:0], batch.lengths[:0], batch.query_starts[:1]
    with pytest.raises(ValueError, match="block_table has no sequence; expected one or more for 1 rows"):
        paged_kv.paged_attention(batch.query, batch.k_pages, batch.v_pages, *none, batch.out())


@needs_compiled
def test_what_is_not_a_tensor_is_refused() -> None:
    pages = torch.zeros(2, 12, 16, 64)
    with pytest.raises(ValueError, match="pairs is not a tensor"):
        C.copy_pages(pages, pages, [[0, 1]], 1, 0)
    with pytest.raises(ValueError, match="instruction set 'mmx' is not available"):
        C.use_isa("mmx")
    with pytest.raises(ValueError, match="CPU kind 'z80' is none of intel, zen5, others"):
        C.use_cpu_kind("z80")


@needs_compiled
def test_arrays_of_other_libraries_come_through_their_capsules() -> None:
    import numpy as np

    pages = torch.randn(3, 12, 16, 64)
    out = np.zeros((12, 20, 64), dtype=np.float32)
    table = np.array([2, 0], dtype=np.int32)
    C.gather_kv(pages, table, 20, out, 1, 0)
    assert torch.equal(torch.from_numpy(out), contiguous(pages, torch.from_numpy(table), 20))


def test_operators_pass_opcheck() -> None:
    batch = make_batch([20, 60], [1, 3])
    clean = [pages.nan_to_num() for pages in (batch.k_pages, batch.v_pages)]
    ops = torch.ops.bark_fast
    query, _, _, table, lengths, starts = batch.arguments()
    samples = [
        (ops.append_kv, (batch.qkv, *clean, torch.tensor([1, 2, 3, -1]))),
        (ops.paged_attention, (query, *clean, table, lengths, starts, torch.zeros(4, 768), 0.125)),
        (
            ops.append_attention,
            (
                batch.qkv,
                *clean,
                table,
                lengths,
                starts,
                torch.tensor([1, 2, 3, -1]),
                torch.zeros(4, 768),
                0.125,
            ),
        ),
        (ops.copy_pages, (*clean, torch.tensor([[0, 1]], dtype=torch.int32))),
        (ops.gather_kv, (clean[0], table[1], 60, torch.zeros(12, 60, 64))),
        (ops.swap_pages, (*clean, torch.tensor([[0, 1]], dtype=torch.int32))),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op.default, arguments)


def test_a_traced_function_calls_the_operators() -> None:
    batch = make_batch([20, 60], [1, 3])

    def step(qkv: Tensor, slots: Tensor, out: Tensor) -> Tensor:
        paged_kv.append_kv(qkv, batch.k_pages, batch.v_pages, slots)
        return paged_kv.paged_attention(*batch.arguments(), out) * 2

    slots = torch.full((4,), -1)
    expected = step(batch.qkv, slots, batch.out())
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)(batch.qkv, slots, batch.out())
    assert torch.equal(traced, expected)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("block_table", (1, 2), 99, r"block_table\[2\] is 99; expected a value in \[0, 9\)"),
        ("lengths", (1,), 65, r"lengths\[1\] is 65; expected a value in \[0, 65\)"),
        ("lengths", (0,), -3, r"lengths\[0\] is -3; "),
        ("query_starts", (0,), 1, r"query_starts is \[1, 1, 4\]; expected 0 to 4, not decreasing"),
        ("query_starts", (1,), 7, r"query_starts is \[0, 7, 4\]; "),
        ("query_starts", (2,), 3, r"query_starts is \[0, 1, 3\]; "),
    ],
)
def test_plain_torch_says_the_same_of_a_wrong_table(
    name: str, index: tuple[int, ...], value: int, message: str
) -> None:
    batch = make_batch([20, 60], [1, 3])
    names = ("query", "k_pages", "v_pages", "block_table", "lengths", "query_starts")
    arguments = dict(zip(names, batch.arguments(), strict=True))
    arguments[name] = with_entry(arguments[name], index, value)
    out = torch.full((4, 768), 7.0)
    with pytest.raises(ValueError, match=message):
        fallback.paged_attention(**arguments, out=out, scale=0.125)
    assert (out == 7).all()


@pytest.fixture
def cuda_part() -> None:
    """Fails where a GPU is not computed on by the CUDA sources: Triton would pass the tests in their place."""
    assert extension.cuda_fault(0) == ""
    assert paged_kv.compiled(0) is not None


@pytest.mark.gpu
@needs_gpu
def test_gpu_runs_the_cuda_part(cuda_part: None) -> None:
    batch = make_batch([300], n_head=12)
    on_gpu, out = batch.to("cuda"), batch.to("cuda").out()
    assert C is not None
    C.paged_attention(*on_gpu.arguments(), out, 0.125, None, None, 1, torch.cuda.current_stream().cuda_stream)
    truth = attend(batch, torch.float64)
    assert float((out.cpu().double() - truth).abs().max()) <= bound(batch, truth)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "bark_fast._C is not part of this build"),
        (SimpleNamespace(cuda_fault=lambda gpu: "built without CUDA"), "built without CUDA; built by g++"),
    ],
)
def test_a_missing_cuda_part_is_told(monkeypatch: pytest.MonkeyPatch, module: object, words: str) -> None:
    monkeypatch.setattr(extension, "_attempt", lambda: (module, "bark_fast._C is not part of this build"))
    monkeypatch.setattr(extension, "describe", lambda: "built by g++, without CUDA: no nvcc")
    assert extension.cuda_fault(0).startswith(words) and extension.cuda_fault(0).endswith("no nvcc")


@pytest.fixture(
    params=["simulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])],
)
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of tensors that the CUDA sources compute with: a GPU's, or the CPU's that simulates one."""
    if request.param == "cuda":
        request.getfixturevalue("cuda_part")
        return "cuda"
    if why_not():
        pytest.skip(why_not())
    monkeypatch.setattr(paged_kv, "compiled", lambda cuda: simulated_cuda())
    return "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("split", [False, True])
def test_cuda_attention_is_as_exact_as_torch(cuda: str, dtype: torch.dtype, head_dim: int, split: bool) -> None:
    for page_size in (16, 64):
        batch = make_batch(
            EDGES, [min(3, n) for n in EDGES], n_head=2, head_dim=head_dim, page_size=page_size, dtype=dtype
        )
        on_gpu = batch.to(cuda)
        scratch = paged_kv.attention_scratch(len(batch.qkv), 2, head_dim, cuda) if split else None
        truth = attend(batch, torch.float64)
        for _ in range(2):  # counters are zero again after a launch
            out = paged_kv.paged_attention(*on_gpu.arguments(), on_gpu.out(), scratch=scratch)
            assert float((out.cpu().double() - truth).abs().max()) <= bound(batch, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("split", [False, True])
def test_cuda_stores_and_sees_new_rows(cuda: str, dtype: torch.dtype, head_dim: int, split: bool) -> None:
    batch = make_batch(*NEW, n_head=2, head_dim=head_dim, dtype=dtype)
    scratch = paged_kv.attention_scratch(len(batch.qkv), 2, head_dim, cuda) if split else None
    for _ in range(2):
        check_append(batch, cuda, scratch)


@pytest.mark.gpu
@needs_gpu
def test_gpu_calls_can_be_captured_and_replayed_with_other_lengths(cuda_part: None) -> None:
    batch = make_batch([1000], n_head=12).to("cuda")
    out, scratch = batch.out(), paged_kv.attention_scratch(1, 12, 64, "cuda")
    slots, place = torch.full((2, 1), -1, device="cuda")
    stored_out = batch.out()
    graph = torch.cuda.CUDAGraph()
    tables = batch.block_table, batch.lengths, batch.query_starts

    def step() -> None:
        paged_kv.append_kv(batch.qkv, batch.k_pages, batch.v_pages, slots)
        paged_kv.paged_attention(*batch.arguments(), out, scratch=scratch)
        paged_kv.append_attention(
            batch.qkv, batch.k_pages, batch.v_pages, *tables, place, stored_out, scratch=scratch
        )

    step()  # what is loaded at the first launch cannot be while a graph is captured
    with torch.cuda.graph(graph):
        step()
    for length in (1000, 17, 513):
        batch.lengths.fill_(length)
        graph.replay()
        truth = attend(batch.to("cpu"), torch.float64)
        assert float((out.cpu().double() - truth).abs().max()) < 1e-5
        after, slot = batch.to("cpu").split_off_new()
        place.copy_(slot)
        graph.replay()
        truth = attend(after, torch.float64)
        assert float((stored_out.cpu().double() - truth).abs().max()) < 1e-5


def test_cuda_rows_that_see_nothing_are_zero_in_split_launches_too(cuda: str) -> None:
    batch = make_batch([100, 700], n_head=1)
    there, truth = batch.to(cuda), attend(batch, torch.float64)
    there.lengths[0] = 0
    scratch = paged_kv.attention_scratch(2, 1, 64, cuda)
    out = paged_kv.paged_attention(*there.arguments(), there.out(), scratch=scratch).cpu()
    assert not out[0].any()
    assert float((out[1].double() - truth[1]).abs().max()) < 1e-5


def test_cuda_launches_that_take_turns_join_their_own_parts_captured_too(cuda: str) -> None:
    scratch = paged_kv.attention_scratch(1, 12, 64, cuda)
    check_turns(
        lambda batch, out: paged_kv.paged_attention(*batch.arguments(), out, scratch=scratch), scratch[1]
    )


def test_cuda_moves_are_exact_and_skip_what_is_out_of_range(cuda: str) -> None:
    batch = make_batch([100], [5], dtype=torch.bfloat16)
    theirs = batch.to(cuda)
    slots = torch.tensor([3, -1, 17, 10**12, 40])
    pairs = torch.tensor([[0, 1], [1, 2], [0, 99], [-1, 3]], dtype=torch.int32)
    paged_kv.append_kv(theirs.qkv, theirs.k_pages, theirs.v_pages, slots.to(cuda))
    paged_kv.copy_pages(theirs.k_pages, theirs.v_pages, pairs.to(cuda))
    fallback.append_kv(batch.qkv, batch.k_pages, batch.v_pages, torch.where(slots < 10**6, slots, -1))
    fallback.copy_pages(batch.k_pages, batch.v_pages, pairs[:2])
    for written, expected in ((theirs.k_pages, batch.k_pages), (theirs.v_pages, batch.v_pages)):
        assert torch.equal(written.cpu().nan_to_num(), expected.nan_to_num())
    table = theirs.block_table[0]
    gathered = paged_kv.gather_kv(theirs.v_pages, table, 100).cpu()
    expected = contiguous(batch.v_pages, batch.block_table[0], 100)
    assert torch.equal(gathered.nan_to_num(), expected.nan_to_num())
    table[2] = len(batch.k_pages)
    gathered = paged_kv.gather_kv(theirs.v_pages, table, 100).cpu()
    assert (gathered[:, 32:48] == 0).all()
    assert torch.equal(gathered[:, 48:].nan_to_num(), expected[:, 48:].nan_to_num())


@pytest.mark.parametrize("split", [False, True])
def test_cuda_keys_on_pages_out_of_range_are_absent(cuda: str, split: bool) -> None:
    batch = make_batch([300, 40], n_head=2)
    theirs = batch.to(cuda)
    scratch = paged_kv.attention_scratch(2, 2, 64, cuda) if split else None
    theirs.block_table[0, [0, 7]] = torch.tensor([len(batch.k_pages), -5], dtype=torch.int32).to(cuda)
    theirs.lengths[1] = 10**6  # more than the table has room for, which is as much as row 0 uses
    theirs.block_table[1, 3:] = 2**31 - 1
    rows = paged_kv.paged_attention(*theirs.arguments(), theirs.out(), scratch=scratch).cpu().view(2, 2, 64)
    there = torch.tensor([t for t in range(300) if t // 16 not in (0, 7)])
    key, value = (
        contiguous(pages, batch.block_table[0], 300)[:, there].double()
        for pages in (batch.k_pages, batch.v_pages)
    )
    weights = torch.softmax(key @ batch.query[0].double()[:, :, None] / 8, dim=1)
    assert float((rows[0] - (weights * value).sum(1)).abs().max()) < 1e-6
    assert rows[1].isnan().all()  # it sees all of its last page, of which the tail holds NaN


def test_cuda_rows_outside_their_sequence_are_zero(cuda: str) -> None:
    batch = make_batch([20, 60], [1, 3]).to(cuda)
    batch.query_starts.copy_(torch.tensor([1, 2, 3], dtype=torch.int32))
    out = paged_kv.paged_attention(*batch.arguments(), batch.out()).cpu()
    assert (out[0] == 0).all() and (out[3] == 0).all()
    assert out.isfinite().all() and out[1].any() and out[2].any()


def test_cuda_new_rows_before_the_first_are_not_followed(cuda: str) -> None:
    batch = make_batch([20], [1]).to(cuda)
    qkv = torch.full((8, batch.qkv.shape[1]), torch.nan, device=cuda)[7:]
    qkv.copy_(batch.qkv)
    batch.query_starts.copy_(torch.tensor([-5, 1], dtype=torch.int32))
    out = paged_kv.append_attention(
        qkv, batch.k_pages, batch.v_pages, batch.block_table, batch.lengths, batch.query_starts,
        torch.full((1,), -1, device=cuda), batch.out(),
    )  # fmt: skip
    assert (out == 0).all()


@pytest.mark.gpu
@needs_gpu
def test_gpu_pages_are_swapped_with_pinned_memory(cuda_part: None) -> None:
    pages = torch.randn(5, 12, 16, 64, device="cuda")
    host = torch.zeros(7, 12, 16, 64).pin_memory()
    paged_kv.swap_pages(pages, host, torch.tensor([[3, 0], [1, 6]], dtype=torch.int32))
    torch.cuda.synchronize()
    assert torch.equal(host[[0, 6]], pages[[3, 1]].cpu())
    assert not host[1:6].any()
