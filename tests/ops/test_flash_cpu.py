"""The extension's attention over contiguous keys: against fp64, on every instruction set this machine has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bark_fast import extension
from bark_fast.ops import attention as ops
from bark_fast.ops.dispatch import prefer

C = extension.load()
FLOOR = {torch.float32: 3e-7, torch.float16: 3e-4, torch.bfloat16: 2e-3}
"""About a rounding of the output, for where torch happens to be exact."""
SHAPES = [(1, 1), (1, 97), (15, 16), (16, 48), (17, 49), (33, 33), (47, 96), (64, 64), (65, 150), (130, 131)]
"""(rows, keys), around vectors, panels and blocks of 48 keys."""

pytestmark = pytest.mark.skipif(C is None, reason=f"bark_fast._C is missing: {extension.why_not()}")


@pytest.fixture(params=list(FLOOR), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def packed(
    batch: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype, pad: int = 0
) -> tuple[Tensor, ...]:
    """q, k, v as views of a projection (batch, keys, 3, heads, head_dim), rows `pad` elements apart."""
    random = torch.Generator().manual_seed(keys + heads)
    width = 3 * heads * head_dim
    qkv = torch.randn(batch, keys, width + pad, generator=random)
    qkv[..., : heads * head_dim] *= 2  # a softmax that is not flat
    return tuple(qkv.to(dtype)[..., :width].view(batch, keys, 3, heads, head_dim).permute(2, 0, 3, 1, 4))


def run(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float = 0.125, threads: int = 1
) -> Tensor:
    """By the extension, into rows that lie apart."""
    batch, heads, rows, head_dim = query.shape
    room = torch.full((batch, rows, heads, head_dim + 5), 7.0, dtype=query.dtype).transpose(1, 2)
    out = room[..., :head_dim]
    C.flash(query, key, value, out, causal, scale, threads)
    assert (room[..., head_dim:] == 7).all()
    return out


def by_torch(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float = 0.125, shift: int = 0
) -> Tensor:
    """The same in the dtype at hand. shift moves the causal limit, to break it."""
    rows, keys = query.shape[2], key.shape[2]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        seen = seen.tril(keys - rows + shift)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


def truth(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """The same in fp64."""
    return by_torch(query.double(), key.double(), value.double(), *arguments, **named)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference; NaN compares false."""
    return float((got.double() - expected).abs().max())


def bound(*arguments: Any) -> float:
    """Twice what torch errs in the same dtype, and a rounding."""
    return 2 * error(by_torch(*arguments), truth(*arguments)) + FLOOR[arguments[0].dtype]


@pytest.mark.parametrize("causal", [False, True])
def test_as_exact_as_torch(isa: str, dtype: torch.dtype, causal: bool) -> None:
    for rows, keys in SHAPES:
        query, key, value = packed(2, keys, 3, 64, dtype)
        arguments = (query[:, :, keys - rows :], key, value, causal)
        assert error(run(*arguments), truth(*arguments)) <= bound(*arguments), (rows, keys)


def test_bark_windows(isa: str, dtype: torch.dtype) -> None:
    for rows, keys, causal in ((1024, 1024, False), (300, 886, True)):
        query, key, value = packed(1, keys, 2, 64, dtype)
        arguments = (query[:, :, keys - rows :], key, value, causal)
        assert error(run(*arguments, threads=2), truth(*arguments)) <= bound(*arguments)


@pytest.mark.parametrize(("spread", "limit"), [(0.1, 2.2e-7), (1.0, 4.2e-7)])
def test_mean_error_over_a_window(isa: str, spread: float, limit: float) -> None:
    """Below what torch's operation errs, 2.6e-7 and 3.9e-7 (AVX2).

    One chain of all weights and exponentials by their Taylor series would err 4.5e-7 and 5.8e-7.
    """
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 1024, 64, generator=random) for _ in range(3))
    arguments = (query[:, :, :256] * spread, key * spread, value, False)
    expected = truth(*arguments)
    assert (run(*arguments).double() - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("head_dim", [2, 6, 32, 46, 128])
def test_other_head_sizes(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    for causal in (False, True):
        arguments = (*packed(1, 70, 2, head_dim, dtype), causal, head_dim**-0.5)
        assert error(run(*arguments), truth(*arguments)) <= bound(*arguments)


def test_the_tolerance_bites() -> None:
    for dtype in FLOOR:
        query, key, value = packed(1, 97, 2, 64, dtype)
        query = query[:, :, 60:]
        limit, expected = bound(query, key, value, True), truth(query, key, value, True)
        wrong = {
            "2 % of scale": truth(query, key, value, True, scale=0.1275),
            "a key too many": truth(query, key, value, True, shift=1),
            "a key too few": truth(query, key, value, True, shift=-1),
            "heads mixed up": expected.roll(1, 1),
            "rows mixed up": expected.roll(1, 2),
            "values off by one": truth(query, key, value.roll(1, 2), True),
            "one block of keys twice": truth(
                query, torch.cat([key[:, :, :48], key], 2), torch.cat([value[:, :, :48], value], 2), True
            ),
        }
        for name, got in wrong.items():
            assert error(got, expected) > limit, (dtype, name)


def test_strides_batches_and_threads(isa: str, dtype: torch.dtype) -> None:
    query, key, value = packed(3, 70, 2, 64, dtype, pad=24)
    expected = run(query, key, value, True)
    apart = (run(*(t[i : i + 1].contiguous() for t in (query, key, value)), True) for i in range(3))
    assert torch.equal(torch.cat(list(apart)), expected)
    for threads in (2, 7):
        assert torch.equal(run(query, key, value, True, threads=threads), expected)


def test_large_scores_and_late_maxima(isa: str, dtype: torch.dtype) -> None:
    """The largest score comes last, or first, or scores are too far apart for exp."""
    query, key, value = (t.clone() for t in packed(1, 100, 1, 64, dtype))
    for at in (0, 50, 99):
        loud = key.clone()
        loud[:, :, at] = 40 * query[:, :, 3]
        arguments = (query, loud, value, False)
        assert error(run(*arguments), truth(*arguments)) <= bound(*arguments)


def test_nan_stays_with_those_who_see_it(isa: str, dtype: torch.dtype) -> None:
    query, key, value = (t.clone() for t in packed(1, 90, 2, 64, dtype))
    expected = run(query, key, value, True)
    key[:, 1, 20] = float("nan")
    got = run(query, key, value, True)
    assert torch.equal(got[:, 0], expected[:, 0])
    assert got[:, 1, 20:].isnan().all() and torch.equal(got[:, 1, :20], expected[:, 1, :20])
    value[:, 0, 89, 3] = float("nan")
    assert run(query, key, value, True)[:, 0, 89, 3].isnan().all()


def test_nothing_beyond_the_operands_is_used(isa: str, dtype: torch.dtype) -> None:
    """What lies before, behind and between rows is NaN; odd numbers of keys too."""
    for keys in (49, 53, 96):
        query, key, value = packed(1, keys, 1, 64, dtype)
        expected = run(query, key, value, False)

        def among_nan(t: Tensor) -> Tensor:
            padded = torch.full((3, 3, t.shape[2] + 4, t.shape[3] + 8), float("nan"), dtype=t.dtype)
            return padded[1:2, 1:2, 2:-2, 4:-4].copy_(t)

        assert torch.equal(run(among_nan(query), among_nan(key), among_nan(value), False), expected)


def test_the_operation_takes_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = packed(2, 40, 3, 64, torch.float32)
    mask = torch.ones(2, 40, dtype=torch.bool)
    for pays in (True, False):
        monkeypatch.setattr(ops, "attends_faster", lambda module, asked, pays=pays: pays)
        got = ops.attention(query, key, value, True)
        expected = run(query, key, value, True) if pays else ops.reference(query, key, value, True)
        assert torch.equal(got, expected)
        if pays:
            assert got.transpose(1, 2).is_contiguous()
        out = torch.empty_like(query)
        assert ops.attention(query, key, value, True, out=out) is out and torch.equal(out, expected)
        traced = torch.empty_like(query)
        torch.ops.bark_fast.attention(query, key, value, True, None, None, 0.125, traced)
        assert torch.equal(traced, expected)
        few = query[:, :, : ops.FEWEST_ROWS - 1]
        assert torch.equal(ops.attention(few, key, value, False), ops.reference(few, key, value, False))
        with prefer("torch"):
            assert torch.equal(ops.attention(query, key, value, True), ops.reference(query, key, value, True))
        for named in ({"key_mask": mask}, {"lengths": torch.tensor([40, 40])}):
            assert torch.equal(
                ops.attention(query, key, value, True, **named), ops.reference(query, key, value, True, **named)
            )
        wide = torch.empty(2, 3, 40, 128)[..., ::2]
        assert torch.equal(
            ops.attention(query, key, value, True, out=wide), ops.reference(query, key, value, True)
        )
        keyless = key[:, :, :0]
        assert ops.attention(query, keyless, keyless, False).eq(0).all()
        other = packed(2, 40, 3, 33, torch.float32)
        assert torch.equal(ops.attention(*other, True), ops.reference(*other, True))
        negative = torch._neg_view(key)
        assert negative.is_neg()
        assert torch.equal(
            ops.attention(query, negative, value, False), ops.reference(query, negative, value, False)
        )


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2"])
def test_where_it_attends_faster(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """Where it multiplies faster, and in bfloat16 where the CPU does and is not Intel's."""
    for intels in (False, True):
        module: Any = SimpleNamespace(isa=lambda: isa, cpu_is_intels=lambda intels=intels: intels)
        for multiplies in (False, True):
            monkeypatch.setattr(ops, "multiplies_faster", lambda module, dtype, answer=multiplies: answer)
            for dtype in FLOOR:
                native = isa == "avx512bf16" and dtype == torch.bfloat16
                assert ops.attends_faster(module, dtype) == (not intels if native else multiplies)


def test_dtypes_that_it_has_not_stay_with_torch() -> None:
    query, key, value = packed(1, 40, 3, 64, torch.float64)
    assert torch.equal(ops.attention(query, key, value, True), ops.reference(query, key, value, True))


def test_prompts_of_the_engine_go_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from bark_fast.ops.paged_prefill import paged_prefill

    heads, rows, older, head_dim = 2, 20, 13, 64
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, 3 * heads * head_dim, generator=random)
    calls: list[int] = []
    flash = C.flash
    monkeypatch.setattr(ops, "attends_faster", lambda module, dtype: True)
    monkeypatch.setattr(C, "flash", lambda *arguments: (calls.append(1), flash(*arguments)))
    results = []
    for backend in ("auto", "torch"):
        pages = torch.randn(2, 3, heads, 16, head_dim, generator=torch.Generator().manual_seed(1))
        with prefer(backend):  # type: ignore[arg-type]
            out = paged_prefill(
                qkv, pages[0], pages[1], torch.tensor([[2, 0, 1]], dtype=torch.int32),
                torch.tensor([older + rows], dtype=torch.int32), torch.tensor([0, rows], dtype=torch.int32),
                torch.full((rows,), -1), torch.empty(rows, heads * head_dim),
            )  # fmt: skip
        results.append(out)
    assert len(calls) == 1 and error(results[0], results[1].double()) < 2e-6


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"query": torch.zeros(1, 2, 4, 8).half()}, "key is float32; expected float16"),
    "integers": (
        {"query": torch.zeros(1, 2, 4, 8, dtype=torch.int64)},
        "query is int64; expected float32, float16",
    ),
    "dimensions": ({"query": torch.zeros(2, 4, 8)}, r"query has shape \(2, 4, 8\)"),
    "key's dtype": ({"key": torch.zeros(1, 2, 6, 8).bfloat16()}, "key is bfloat16; expected float32"),
    "heads": ({"key": torch.zeros(1, 1, 6, 8)}, r"key has shape \(1, 1, 6, 8\)"),
    "values": ({"value": torch.zeros(1, 2, 5, 8)}, r"value has shape \(1, 2, 5, 8\)"),
    "columns": ({"value": torch.zeros(1, 2, 8, 6).transpose(2, 3)}, "value has stride 6 in dimension 3"),
    "out": ({"out": torch.zeros(1, 2, 3, 8)}, r"out has shape \(1, 2, 3, 8\)"),
    "too few keys": (
        {"key": torch.zeros(1, 2, 3, 8), "value": torch.zeros(1, 2, 3, 8)},
        "there are 3 keys for 4 queries; expected as many or more",
    ),
    "no keys": (
        {"key": torch.zeros(1, 2, 0, 8), "value": torch.zeros(1, 2, 0, 8), "causal": False},
        "there are 0 keys for 4 queries; expected at least one",
    ),
    "scale": ({"scale": 0.0}, "scale is 0.0+; expected a positive value"),
    "no tensor": ({"key": [0.0]}, "key is not a tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named_before_anything_is_written(name: str) -> None:
    change, message = WRONG[name]
    sound: dict[str, Any] = {
        "query": torch.ones(1, 2, 4, 8), "key": torch.ones(1, 2, 6, 8), "value": torch.ones(1, 2, 6, 8),
        "out": torch.full((1, 2, 4, 8), 7.0), "causal": True, "scale": 0.5, "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        C.flash(**{**sound, **change})
    assert (sound["out"] == 7).all()
    C.flash(**sound)
    assert (sound["out"] == 1).all()
