"""Flash attention against its definition in fp64, on every backend at hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bark_fast.errors import InvalidInput
from bark_fast.ops import attention as ops
from bark_fast.ops.dispatch import prefer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 3e-7, torch.float16: 2e-4, torch.bfloat16: 2e-3}
"""About a rounding of the output, for where torch happens to be exact."""
EDGES = [(1, 1), (1, 70), (31, 33), (32, 64), (33, 65), (64, 64), (65, 65), (127, 129)]
"""(time, keys), around the blocks of 32 and 64."""
BARK = [(257, 257), (887, 887), (60, 947), (1024, 1024)]

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
if HAS_GPU:  # all of them, then, say what a GPU computes
    pytestmark = pytest.mark.gpu
cuda = partial(pytest.param, marks=pytest.mark.gpu)
cpu = partial(pytest.param, marks=pytest.mark.skipif(HAS_GPU, reason="beside a GPU nothing is interpreted"))


@pytest.fixture(autouse=True)
def triton_is_installed() -> None:
    pytest.importorskip("triton")


def truth(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    present: Tensor | None = None,
    scale: float | None = None,
    shift: int = 0,
) -> Tensor:
    """The definition, in fp64. present: (batch, keys) bool. shift moves the causal limit, to break it."""
    query, key, value = (t.double() for t in (query, key, value))
    time, keys = query.shape[2], key.shape[2]
    scores = query @ key.transpose(2, 3) * (scale or query.shape[3] ** -0.5)
    seen = torch.ones(1, 1, time, keys, dtype=torch.bool, device=query.device)
    if causal:
        seen = seen.tril(keys - time + shift)
    if present is not None:
        seen = seen & present[:, None, None]
        value = value.where(present[:, None, :, None], 0.0)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return weights.where(seen, 0.0) @ value


def packed(
    batch: int, time: int, heads: int, head_dim: int, dtype: torch.dtype, device: str, pad: int = 0
) -> tuple[Tensor, ...]:
    """q, k, v as views of a projection (batch, time, 3, heads, head_dim), rows `pad` elements apart."""
    random = torch.Generator().manual_seed(time + heads)
    width = 3 * heads * head_dim
    qkv = torch.randn(batch, time, width + pad, generator=random)
    qkv[..., : heads * head_dim] *= 2  # a softmax that is not flat
    return tuple(
        qkv.to(device, dtype)[..., :width].view(batch, time, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    )


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference; NaN stays NaN and compares false."""
    return float((got.double() - expected).abs().max())


def bound(expected: Tensor, *arguments: object, **named: object) -> float:
    """Twice what torch errs in the same dtype, and a rounding."""
    with prefer("torch"):
        theirs = ops.attention(*arguments, **named)  # type: ignore[arg-type]
    return 2 * error(theirs, expected) + FLOOR[theirs.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("device", "shape"), [cpu("cpu", s) for s in EDGES] + [cuda("cuda", s) for s in EDGES + BARK], ids=str
)
def test_as_exact_as_torch(device: str, shape: tuple[int, int], dtype: torch.dtype, causal: bool) -> None:
    time, keys = shape
    query, key, value = packed(2, keys, 3 if device == "cpu" else 12, 64, dtype, device)
    query = query[:, :, keys - time :]
    expected = truth(query, key, value, causal)
    limit = bound(expected, query, key, value, causal)
    with prefer("triton"):
        got = ops.attention(query, key, value, causal)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    assert error(got, expected) <= limit
    if keys > 1:
        assert error(truth(query, key, value, causal, scale=1.02 / 8), expected) > limit, "2 % of scale"
    if causal and keys > time > 1:
        for shift in (-1, 1):
            assert error(truth(query, key, value, True, shift=shift), expected) > limit, "a mask off by one"


def check_with_mutations(arguments: tuple[Tensor, Tensor, Tensor, bool]) -> None:
    """As exact as torch, by a bound that 2 % of scale, 16 keys left out or a mask off by one would exceed."""
    query, key, _, causal = arguments
    expected = truth(*arguments)
    limit = bound(expected, *arguments)
    with prefer("triton"):
        assert error(ops.attention(*arguments), expected) <= limit
    assert error(truth(*arguments, scale=1.02 * query.shape[3] ** -0.5), expected) > limit
    present = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    present[:, 16:32] = False
    assert error(truth(*arguments, present=present), expected) > limit
    if causal:
        # one key fewer would leave the first query none
        assert error(truth(*arguments, shift=1), expected) > limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("device", [cpu("cpu"), cuda("cuda")])
def test_other_head_sizes(device: str, head_dim: int, dtype: torch.dtype) -> None:
    for time, causal in ((33, False), (70, True)):
        check_with_mutations((*packed(1, time, 2, head_dim, dtype, device), causal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("device", "batch", "heads", "time"),
    [cpu("cpu", 1, 2, 200), cuda("cuda", 8, 16, 1024), cuda("cuda", 8, 16, 887)],
)
def test_the_blocks_of_a_large_grid(
    device: str, batch: int, heads: int, time: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # every entry of the table is right, whatever shape it is meant for
        from bark_fast.kernels import attention as kernels

        monkeypatch.setattr(kernels, "blocks", lambda *_: kernels.Blocks(128, 64, 8, 2))
    for causal in (False, True):
        check_with_mutations((*packed(batch, time, heads, 64, dtype, device), causal))


@pytest.mark.parametrize("processors", [1, 4, 1000])
@pytest.mark.skipif(HAS_GPU, reason="a GPU cannot be told how many processors it has")
def test_every_block_of_queries_is_computed_in_whatever_order(processors: int) -> None:
    from bark_fast.kernels.target import Target, assume

    arguments = (*packed(1, 200, 2, 64, torch.float16, "cpu"), True)
    expected = truth(*arguments)
    with prefer("triton"), assume(Target(90, processors, 232_448)):
        assert error(ops.attention(*arguments), expected) <= bound(expected, *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("what", ["left", "right", "holes", "lengths", "both"])
@pytest.mark.parametrize("device", [cpu("cpu"), cuda("cuda")])
def test_absent_keys(device: str, what: str, causal: bool, dtype: torch.dtype) -> None:
    time, position = 70, torch.arange(70)
    query, key, value = packed(4, time, 2, 64, dtype, device)
    ends = torch.tensor([0, 1, 64, 70])
    present = {
        "left": position >= 70 - ends[:, None],
        "right": position < ends[:, None],
        "holes": torch.rand(4, 70, generator=torch.Generator().manual_seed(3)) < 0.5,
        "lengths": position < ends[:, None],
        "both": (position < ends[:, None]) & (position % 3 > 0),
    }[what].to(device)
    absent = ~present[:, None, :, None].expand_as(key)
    key, value = (t.masked_fill(absent, float("nan")).contiguous() for t in (key, value))
    named: dict[str, Tensor] = {}
    if what in ("lengths", "both"):
        named["lengths"] = ends.to(device, torch.int32 if causal else torch.int64)
    if what != "lengths":
        named["key_mask"] = present if what != "both" else (position % 3 > 0).expand(4, -1).to(device)
    expected = truth(query, key.nan_to_num(), value.nan_to_num(), causal, present)
    limit = bound(expected, query, key, value, causal, **named)
    with prefer("triton"):
        got = ops.attention(query, key, value, causal, **named)
    assert error(got, expected) <= limit
    one_more = present.roll(1, 1)
    assert error(truth(query, key.nan_to_num(), value.nan_to_num(), causal, one_more), expected) > limit
    if what not in ("holes",):
        assert (got[0] == 0).all(), "a query that sees no key"


@pytest.mark.skipif(HAS_GPU, reason="beside a GPU nothing is interpreted")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_some_queries_do_not_see_come_last_or_on_hopper_first(causal: bool, arch: int) -> None:
    """Every kind of GPU's order is interpreted here, with lengths within a block and at its ends."""
    from bark_fast.kernels.target import KNOWN, assume

    time, keys = 65, 200
    query, key, value = packed(6, keys, 1, 64, torch.float32, "cpu")
    query, ends = query[:, :, keys - time :], torch.tensor([0, 1, 64, 128, 129, 200])
    expected = truth(query, key, value, causal, torch.arange(keys) < ends[:, None])
    limit = bound(expected, query, key, value, causal, lengths=ends)
    with prefer("triton"), assume(KNOWN[arch]):
        assert error(ops.attention(query, key, value, causal, lengths=ends), expected) <= limit


@pytest.mark.parametrize("device", [cpu("cpu"), cuda("cuda")])
def test_any_strides_and_somewhere_to_write(device: str) -> None:
    query, key, value = packed(2, 40, 3, 64, torch.float32, device, pad=5)  # rows on no 16-byte boundary
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    expected = truth(query, key, value, True, scale=0.3)
    memory = torch.full((2, 3, 40, 67), 7.0, device=device)
    with prefer("triton"):
        got = ops.attention(query, key, value, True, scale=0.3, out=memory[..., 1:65])
    assert got.data_ptr() == memory[..., 1:65].data_ptr()
    assert error(got, expected) <= bound(expected, query, key, value, True, scale=0.3)
    assert (memory[..., 0] == 7).all() and (memory[..., 65:] == 7).all(), "only the result is written"
    with prefer("torch"):
        assert error(ops.attention(query, key, value, True, scale=0.3, out=memory[..., 1:65]), expected) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_negated_view_of_queries_is_read_as_such(backend: str) -> None:
    """What lies in its memory has the other sign."""
    query, key, value = packed(1, 20, 2, 64, torch.float32, DEVICE)
    with prefer(backend):  # type: ignore[arg-type]
        expected = ops.attention(-query, key, value, True)
        assert torch.equal(ops.attention(torch._neg_view(query), key, value, True), expected)


def test_nan_reaches_the_queries_that_see_it_and_no_others() -> None:
    query, key, value = (t.clone() for t in packed(1, 70, 2, 64, torch.float32, DEVICE))
    key[0, 1, 40, 3] = float("nan")
    with prefer("triton"):
        got = ops.attention(query, key, value, True)
    assert got[0, 1, 40:].isnan().all()
    assert not got[0, 1, :40].isnan().any() and not got[0, 0].isnan().any()


def test_no_queries() -> None:
    query, key, value = packed(2, 5, 3, 64, torch.float32, DEVICE)
    with prefer("triton"):
        assert ops.attention(query[:, :, :0], key, value, True).shape == (2, 3, 0, 64)
        assert (ops.attention(query, key[:, :, :0], value[:, :, :0], False) == 0).all()


BAD = {
    r"query has shape \(3, 5, 64\)": {"query": (0, slice(None))},
    r"value has shape \(2, 3, 4, 64\); it must be \(2, 3, 5, 64\)": {
        "value": (slice(None), slice(None), slice(1, None))
    },
    "there are 3 keys for 5 queries": {
        name: (slice(None), slice(None), slice(2, None)) for name in ("key", "value")
    },
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_arguments_are_named(backend: str) -> None:
    good = dict(zip(("query", "key", "value"), packed(2, 5, 3, 64, torch.float32, "cpu"), strict=True))
    with prefer(backend):  # type: ignore[arg-type]
        for message, change in BAD.items():
            wrong = {**good, **{name: good[name][index] for name, index in change.items()}}
            with pytest.raises(InvalidInput, match=message):
                ops.attention(**wrong, causal=True)
        with pytest.raises(InvalidInput, match="key is float16; it must be float32"):
            ops.attention(good["query"], good["key"].half(), good["value"], False)
        with pytest.raises(InvalidInput, match="lengths is float32; it must be int32 or int64"):
            ops.attention(**good, causal=True, lengths=torch.ones(2))
        with pytest.raises(InvalidInput, match=r"key_mask has shape \(2, 4\)"):
            ops.attention(**good, causal=True, key_mask=torch.ones(2, 4, dtype=torch.bool))
        for scale in (-1.0, 0.0, float("nan")):
            with pytest.raises(InvalidInput, match=f"scale is {scale}; it must be positive"):
                ops.attention(**good, causal=True, scale=scale)


def test_what_only_torch_computes_is_named() -> None:
    square = torch.randn(1, 1, 64, 64)
    with prefer("triton"):
        with pytest.raises(InvalidInput, match="head_dim is 48"):
            ops.attention(*[square[..., :48]] * 3, False)
        with pytest.raises(InvalidInput, match=r"query is torch\.float64"):
            ops.attention(*[square.double()] * 3, False)
        with pytest.raises(InvalidInput, match="key has last stride 64"):
            ops.attention(square, square.transpose(2, 3), square, False)


def test_the_operator_passes_opcheck_and_traces() -> None:
    query, key, value = packed(1, 6, 2, 32, torch.float32, "cpu")
    mask = torch.tensor([[True, True, False, True, True, True]])
    arguments = (query, key, value, True, mask, torch.tensor([5]), 0.2)
    torch.library.opcheck(torch.ops.bark_fast.attention, (*arguments, torch.zeros(1, 2, 6, 32)))
    call = partial(ops.attention, query, key, value, True, key_mask=mask)
    traced = torch.compile(lambda: call() * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(), call() * 2)
