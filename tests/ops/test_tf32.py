"""fp32 is multiplied as fp32, and as TF32 only where torch is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from paged_batches import make_batch
from torch import Tensor

from bark_fast.ops.attention import attention
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.paged_prefill import paged_prefill

target = pytest.importorskip("bark_fast.kernels.target")
norm_linear = pytest.importorskip("bark_fast.kernels.norm_linear")
TILE = norm_linear.matmul.tile(target.KNOWN[90], torch.float32, 64, 768, 768)
"""What multiplies fp32 on tensor cores where the table does not leave it to cuBLAS."""
MATMUL = torch.backends.cuda.matmul

ASKING: dict[str, Callable[[], None]] = {
    "by the old flag": partial(setattr, MATMUL, "allow_tf32", True),
    "by precision": partial(torch.set_float32_matmul_precision, "high"),
    "by the new flag": partial(setattr, MATMUL, "fp32_precision", "tf32"),
    "for all of torch": partial(setattr, torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """Leave torch's flags as they were."""
    before = torch.backends.fp32_precision, MATMUL.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, MATMUL.fp32_precision = before


@pytest.mark.parametrize("asking", ASKING)
def test_torchs_flag_asks_for_it(asking: str) -> None:
    assert target.precision(torch.float32) == "ieee"
    ASKING[asking]()
    assert target.precision(torch.float32) == "tf32"
    # one kernel, either way
    assert target.precision(torch.float16) == target.precision(torch.bfloat16) == "ieee"


def products() -> dict[str, Callable[[], object]]:
    """A call of each kernel that may multiply fp32 on tensor cores."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    qkv = random(1, 33, 3, 2, 32).permute(2, 0, 3, 1, 4)
    batch = make_batch([20, 60], [20, 3], n_head=2)
    _, slots = batch.split_off_new()
    tables = batch.block_table, batch.lengths, batch.query_starts

    return {
        "linear": partial(norm_linear.planned, TILE, random(20, 64), None, random(48, 64), None, None, False),
        "attention": partial(attention, *qkv, causal=True),
        "prefill": partial(paged_prefill, batch.qkv, batch.k_pages, batch.v_pages, *tables, slots, batch.out()),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU nothing is interpreted")
@pytest.mark.parametrize("product", ["linear", "attention", "prefill"])
def test_every_product_obeys(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    multiply = interpreter.InterpreterBuilder.create_dot
    seen = []

    def note(self: object, a: object, b: object, d: object, precision: object, *rest: object) -> object:
        seen.append(str(precision).rsplit(".", 1)[-1])
        return multiply(self, a, b, d, precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", note)
    call = products()[product]
    with prefer("triton"):
        call()
        assert seen and set(seen) == {"IEEE"}
        seen.clear()
        MATMUL.allow_tf32 = True
        call()
    assert seen and set(seen) == {"TF32"}


def rounded(x: Tensor) -> Tensor:
    """x to 10 bits of mantissa, to the nearest, in fp64."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32).double()


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU nothing is interpreted")
@pytest.mark.parametrize("asked", [True, False])
def test_operands_are_rounded_where_tensor_cores_would_cut_them_off(asked: bool) -> None:
    """The interpreter multiplies in fp32 whatever is asked for: what it shows of TF32 is the operands."""
    MATMUL.allow_tf32 = asked
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, weight, residual = random(20, 64), random(48, 64), random(20, 48)
    x[3, 5] = torch.nan
    operands = random(3, 1, 2, 40, 32).unbind(0)
    as_multiplied = rounded if asked else Tensor.double
    with prefer("triton"):
        product = norm_linear.planned(TILE, x, None, weight, None, residual, False)
        attended = attention(*operands, causal=False)
        for index in range(3):
            less = [rounded(one).float() if place == index else one for place, one in enumerate(operands)]
            assert attention(*less, causal=False).equal(attended) == asked
        MATMUL.allow_tf32 = False
        weights_too = attention(*(rounded(one).float() for one in operands), causal=False)
    exact = as_multiplied(x) @ as_multiplied(weight).T + residual.double()
    assert torch.allclose(product.double(), exact, rtol=0, atol=1e-5, equal_nan=True)
    assert 1e-6 < (attended - weights_too).abs().max() < 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU nothing is interpreted")
def test_so_are_those_of_prompts_over_pages() -> None:
    MATMUL.allow_tf32 = True
    batch = make_batch([20, 60], [20, 3], n_head=2)
    _, slots = batch.split_off_new()
    tables = batch.block_table, batch.lengths, batch.query_starts
    with prefer("triton"):
        seen = [
            paged_prefill(qkv, k_pages, v_pages, *tables, slots, batch.out())
            for qkv, k_pages, v_pages in (
                (batch.qkv, batch.k_pages.clone(), batch.v_pages.clone()),
                [rounded(one).float() for one in (batch.qkv, batch.k_pages, batch.v_pages)],
            )
        ]
    assert seen[0].equal(seen[1])


@pytest.mark.gpu
def test_gpu_errs_as_torchs_products_do() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    random = partial(torch.randn, device="cuda", generator=generator)
    x, weight = random(64, 768), random(768, 768)
    query, key, value = random(3, 2, 12, 200, 64).unbind(0)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """By plain products, which obey the flag."""
        return (query @ key.transpose(2, 3) / 8).softmax(-1) @ value

    def error(got: Tensor, exact: Tensor) -> float:
        return float((got.double() - exact).abs().max() / exact.abs().max())

    for tf32 in (False, True):
        MATMUL.allow_tf32 = tf32
        with prefer("triton"):
            product = norm_linear.planned(TILE, x, None, weight, None, None, False)
            attended = attention(query, key, value, causal=False)
        for got, torchs, exact in (
            (product, x @ weight.T, x.double() @ weight.double().T),
            (attended, attend(query, key, value), attend(query.double(), key.double(), value.double())),
        ):
            ours = error(got, exact)
            assert ours <= 2 * error(torchs, exact) + 1e-6
            assert (ours > 3e-5) == tf32
