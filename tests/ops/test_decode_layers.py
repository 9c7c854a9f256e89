"""All layers of a decode step in one call, against the operations one by one and against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bark_fast import extension
from bark_fast.ops import decode_layers as ops
from bark_fast.ops.decode_layers import WEIGHTS, LayerWeights, PagedRows, decode_layers
from bark_fast.ops.dispatch import prefer

C = extension.load()
ISAS = C.isas() if C is not None else []
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS, HEAD_DIM, PAGE = 3, 32, 16
WIDTH = HEADS * HEAD_DIM
LENGTHS = [1, 16, 17, 33, 700, 5, 128, 300]

needs_compiled = pytest.mark.skipif(C is None, reason=f"bark_fast._C is missing: {extension.why_not()}")


@pytest.fixture(params=[*ISAS, "plain torch"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every way this machine can compute, one after another."""
    if request.param == "plain torch":
        with prefer("torch"):
            yield request.param
        return
    before = C.isa()
    C.use_isa(request.param)
    yield request.param
    C.use_isa(before)


def make(rows: int, dtype: torch.dtype, layers: int = 3) -> tuple[Tensor, list[Tensor | None], PagedRows]:
    """Random rows, weights (some biases missing) and pages; what no sequence has stored is NaN."""
    random = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    weights: list[Tensor | None] = []
    for layer in range(layers):
        biased = layer != 1
        for n, k in (
            (WIDTH, 0),
            (3 * WIDTH, WIDTH),
            (WIDTH, WIDTH),
            (WIDTH, 0),
            (4 * WIDTH, WIDTH),
            (WIDTH, 4 * WIDTH),
        ):
            weights.append((draw(n, k) / k**0.5 if k else 1 + draw(n) / 4).to(dtype))
            weights.append((draw(n) / 4).to(dtype) if biased else None)
    lengths = LENGTHS[:rows] if rows <= len(LENGTHS) else [1 + 7 * row for row in range(rows)]
    need = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(need), generator=random).int().split(need)
    table = torch.full((rows, max(need)), -1, dtype=torch.int32)
    slots = torch.empty(rows, dtype=torch.int64)
    keys, values = (
        [torch.full((sum(need), HEADS, PAGE, HEAD_DIM), float("nan")) for _ in range(layers)] for _ in "kv"
    )
    for row, (length, pages) in enumerate(zip(lengths, order, strict=True)):
        table[row, : len(pages)] = pages
        slots[row] = int(pages[(length - 1) // PAGE]) * PAGE + (length - 1) % PAGE
        for t in range(length - 1):
            for stored in (*keys, *values):
                stored[int(pages[t // PAGE]), :, t % PAGE] = draw(HEADS, HEAD_DIM)
    cache = PagedRows(
        [k.to(dtype) for k in keys], [v.to(dtype) for v in values], table,
        torch.tensor(lengths, dtype=torch.int32), torch.arange(rows + 1, dtype=torch.int32), slots,
    )  # fmt: skip
    return draw(rows, WIDTH).to(dtype), LayerWeights(weights), cache


def copied(cache: PagedRows) -> PagedRows:
    return replace(cache, keys=[k.clone() for k in cache.keys], values=[v.clone() for v in cache.values])


def by_torch(x: Tensor, weights: list[Tensor | None], cache: PagedRows, dtype: torch.dtype) -> Tensor:
    """The definition, sequence by sequence over contiguous keys and values; the cache is left alone."""
    x = x.to(dtype)
    arguments: list[Any] = [None if w is None else w.to(dtype) for w in weights]
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        ln_1, ln_1_b, qkv_w, qkv_b, out, out_b, ln_2, ln_2_b, fc, fc_b, proj, proj_b = arguments[
            layer * WEIGHTS : (layer + 1) * WEIGHTS
        ]
        qkv = F.linear(F.layer_norm(x, (WIDTH,), ln_1, ln_1_b), qkv_w, qkv_b).view(len(x), 3, HEADS, HEAD_DIM)
        seen = []
        for row, length in enumerate(cache.lengths.tolist()):
            pages = cache.block_table[row, : -(-length // PAGE)].long()
            old = [t[pages].transpose(0, 1).flatten(1, 2)[:, : length - 1].to(dtype) for t in (keys, values)]
            key, value = (torch.cat([o, qkv[row, 1 + i][:, None]], 1) for i, o in enumerate(old))
            seen.append(F.scaled_dot_product_attention(qkv[row, 0][:, None], key, value).flatten())
        x = x + F.linear(torch.stack(seen), out, out_b)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,), ln_2, ln_2_b), fc, fc_b)), proj, proj_b)
    return x


def expected_and_bound(x: Tensor, weights: list[Tensor | None], cache: PagedRows) -> tuple[Tensor, float]:
    expected = by_torch(x, weights, cache, torch.float64)
    erred = (by_torch(x, weights, cache, x.dtype).double() - expected).abs().max().item()
    return expected, 2 * erred + torch.finfo(x.dtype).eps * expected.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17])
def test_it_is_as_exact_as_torch(isa: str, dtype: torch.dtype, rows: int) -> None:
    x, weights, cache = make(rows, dtype)
    expected, bound = expected_and_bound(x, weights, cache)
    before = x.clone()
    got = decode_layers(x, weights, copied(cache))
    assert (got.double() - expected).abs().max() <= bound
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", ["columns", "stride of a bias", "rows of x", "negated x"])
def test_tensors_that_lie_otherwise(layout: str) -> None:
    x, weights, cache = make(3, torch.float32)
    expected, bound = expected_and_bound(x, weights, cache)
    if layout == "columns":
        weights = LayerWeights(
            one.t().contiguous().t() if one is not None and one.dim() == 2 else one for one in weights
        )
    elif layout == "stride of a bias":
        weights = LayerWeights(
            torch.stack([one, one], -1)[:, 0] if one is not None and one.dim() == 1 else one for one in weights
        )
    elif layout == "rows of x":
        x = x.t().contiguous().t()
    else:
        x = torch._neg_view(-x)
        assert x.is_neg()
    got = decode_layers(x, weights, copied(cache))
    assert (got.double() - expected).abs().max() <= bound


@needs_compiled
def test_a_tensor_without_memory_is_refused() -> None:
    """Its data pointer is null: a subclass that keeps its numbers elsewhere, or one of torch's fakes."""
    x, weights, cache = make(1, torch.float32)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(weights[2])
    weights[2] = fake
    with pytest.raises(ValueError, match="has no memory of its own"):
        C.decode_layers(
            x, weights, cache.keys, cache.values, cache.block_table, cache.lengths, cache.query_starts,
            cache.slots, torch.empty_like(x), 1.0, 1,
        )  # fmt: skip


@pytest.mark.parametrize(
    "wrong", ["order of layers", "a layer less", "keys and values", "residual", "one page"]
)
def test_the_tolerance_bites(wrong: str) -> None:
    x, weights, cache = make(8, torch.float32)
    expected, bound = expected_and_bound(x, weights, cache)
    if wrong == "order of layers":
        weights = LayerWeights(weights[WEIGHTS:] + weights[:WEIGHTS])
    elif wrong == "a layer less":
        cache = replace(cache, keys=cache.keys[:2], values=cache.values[:2])
    elif wrong == "keys and values":
        cache = replace(cache, keys=cache.values, values=cache.keys)
    elif wrong == "residual":
        expected = expected - x.double()
    else:
        cache.block_table[4, :2] = cache.block_table[4, [1, 0]]
        cache.keys[0][cache.block_table[4, 0]] *= 1.01
    assert (by_torch(x, weights, cache, torch.float64) - expected).abs().max() > bound


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_one_call_has_the_bits_of_the_operations(
    dtype: torch.dtype, rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights, cache = make(rows, dtype)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for _ in range(3):  # nothing is left behind by a call
        one, many = copied(cache), copied(cache)
        together = decode_layers(x, weights, one)
        with monkeypatch.context() as apart:
            apart.setattr(ops, "is_eager", lambda tensor: False)
            assert torch.equal(decode_layers(x, weights, many), together)
        for stored, also in zip((*one.keys, *one.values), (*many.keys, *many.values), strict=True):
            assert torch.equal(stored.nan_to_num(7.0), also.nan_to_num(7.0))


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 7])
def test_a_row_is_the_same_to_the_bit_whoever_runs_beside_it(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weights, cache = make(8, dtype)  # one of them so long that seven threads share it
    whole = decode_layers(x, weights, copied(cache))
    for rows in (slice(0, 1), slice(3, 6), slice(4, 5), slice(2, 8)):
        some = replace(
            copied(cache),
            block_table=cache.block_table[rows],
            lengths=cache.lengths[rows],
            query_starts=cache.query_starts[: rows.stop - rows.start + 1],
            slots=cache.slots[rows],
        )
        assert torch.equal(decode_layers(x[rows], weights, some), whole[rows])


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("counts", [[1, 1], [4, 1, 3], [8, 8], [1, 1, 1, 3, 4, 1, 1, 4]], ids=str)
def test_rows_of_one_sequence_are_what_they_are_one_after_another(
    isa: str, dtype: torch.dtype, counts: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, by all that computes a row as if it were alone; where pages or parts of keys begin, too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setitem(globals(), "LENGTHS", [1, 14, 17, 255, 510, 5, 128, 300])
    seqs, rows = len(counts), sum(counts)
    x, weights, cache = make(seqs, dtype)
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    columns, pages = 64, cache.keys[0].shape[0]
    table = torch.arange(seqs * columns, dtype=torch.int32).view(seqs, columns)
    table[:, : cache.block_table.shape[1]] = cache.block_table  # and pages of NaN behind them
    table[table < 0] = pages
    room = torch.full((seqs * columns, HEADS, PAGE, HEAD_DIM), torch.nan, dtype=dtype)
    table[table >= pages] = pages + torch.arange(int((table >= pages).sum()), dtype=torch.int32)
    keys, values = ([torch.cat([one, room]) for one in kind] for kind in (cache.keys, cache.values))
    before = cache.lengths - 1  # its last key is among the new ones
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    places = [(seq, int(before[seq]) + key) for seq, count in enumerate(counts) for key in range(count)]
    slots = torch.tensor([int(table[seq, at // PAGE]) * PAGE + at % PAGE for seq, at in places])
    lengths = before + torch.tensor(counts, dtype=torch.int32)
    together = PagedRows(keys, values, table, lengths, starts, slots)
    apart = copied(together)
    got = decode_layers(x, weights, together)
    for row, (seq, at) in enumerate(places):
        one = replace(
            apart,
            block_table=table[seq : seq + 1],
            lengths=torch.tensor([at + 1], dtype=torch.int32),
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            slots=slots[row : row + 1],
        )
        alone = decode_layers(x[row : row + 1], weights, one)
        if isa == "plain torch":
            assert torch.allclose(got[row : row + 1], alone, rtol=0.02, atol=0.02 * float(alone.abs().max()))
        else:
            assert torch.equal(got[row : row + 1], alone), row
    if isa != "plain torch":
        for stored, also in zip((*together.keys, *together.values), (*apart.keys, *apart.values), strict=True):
            assert torch.equal(stored.nan_to_num(7.0), also.nan_to_num(7.0))


@needs_compiled
def test_a_row_without_a_slot_stores_nothing() -> None:
    x, weights, cache = make(2, torch.float32)
    full = copied(cache)
    decode_layers(x, weights, full)  # stores the new keys, so that they can be read without being stored
    stored = copied(full)
    out = decode_layers(x, weights, replace(stored, slots=torch.full((2,), -1)))
    assert torch.equal(out, decode_layers(x, weights, copied(cache)))
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(stored.keys, full.keys, strict=True)
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a layer's keys missing": ({"keys": 2}, "36 weights, 2 keys and 3 values"),
    "weights missing": ({"weights": 35}, "35 weights, 3 keys and 3 values"),
    "slot of another row": (
        {"slots": torch.tensor([16, 16])},
        r"slots\[\d\] is 16; expected \d+, the slot of its key",
    ),
    "too many rows": (
        {
            "x": torch.zeros(9, WIDTH),
            "query_starts": torch.tensor([0, 9, 9], dtype=torch.int32),
            "slots": torch.full((9,), -1),
        },
        r"rows of sequence\[0\] is 9; expected a value in \[0, 9\)",
    ),
    "more rows than keys": (
        {
            "x": torch.zeros(3, WIDTH),
            "query_starts": torch.tensor([0, 2, 3], dtype=torch.int32),
            "slots": torch.full((3,), -1),
        },
        r"lengths\[0\] is 1; expected a value in \[2,",
    ),
    "scales missing": ({"scales": [torch.ones(1)]}, "1 scales; expected none, or 4 of each layer"),
    "matrices that are not int8": ({"scales": [torch.ones(1)] * 12}, "qkv is float32; expected int8"),
    "no keys": ({"lengths": torch.tensor([0, 16], dtype=torch.int32)}, r"lengths\[0\] is 0"),
    "page out of range": ({"block_table": torch.full((2, 1), 9, dtype=torch.int32)}, r"block_table\[0\] is 9"),
    "dtype": ({"x": torch.zeros(2, WIDTH, dtype=torch.float16)}, "is float32; expected float16"),
    "width": ({"x": torch.zeros(2, WIDTH + 1)}, r"qkv has shape"),
}


@needs_compiled
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named_before_anything_is_written(name: str) -> None:
    change, message = WRONG[name]
    x, weights, cache = make(2, torch.float32)
    sound: dict[str, Any] = {"x": x, "weights": weights, **vars(cache)}
    changed = {key: sound[key][:value] if isinstance(value, int) else value for key, value in change.items()}
    arguments = {**sound, **changed}
    out = torch.full_like(arguments["x"], 7.0)
    before = copied(cache)
    with pytest.raises(ValueError, match=message):
        C.decode_layers(**arguments, out=out, scale=1.0, threads=1)
    assert (out == 7).all()
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before.keys, cache.keys, strict=True)
    )
