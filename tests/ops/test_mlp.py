"""x + proj(gelu(fc(LN(x)))) against its definition in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from linear_cases import DEVICES, error
from torch import Tensor

from bark_fast.config import GPTConfig
from bark_fast.errors import InvalidInput
from bark_fast.kernels.target import KNOWN, assume
from bark_fast.modules.layer import Layer
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.mlp import layernorm_gelu_mlp
from bark_fast.ops.norm_linear import linear_scratch


@pytest.fixture(autouse=True)
def few_processors() -> Iterator[None]:
    """A small chip, so that small layers are not cut into programs of one line: the interpreter is slow."""
    with assume(replace(KNOWN[90], processors=4)):
        yield


def weights(width: int, dtype: torch.dtype, device: str, biases: bool) -> list[Tensor | None]:
    """Everything but x, in the order of the arguments."""
    random = torch.Generator().manual_seed(width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    return [
        1 + draw(width) / 4, draw(width) / 4 if biases else None,
        draw(4 * width, width) / width**0.5, draw(4 * width) if biases else None,
        draw(width, 4 * width) / width**0.5, draw(width) if biases else None,
    ]  # fmt: skip


def by_torch(x: Tensor, arguments: list[Tensor | None], approximate: str = "none") -> Tensor:
    """Rounding after every operation, in the dtype at hand."""
    norm_weight, norm_bias, fc, fc_bias, proj, proj_bias = arguments
    assert fc is not None and proj is not None
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-5), fc, fc_bias)
    return x + F.linear(F.gelu(hidden, approximate=approximate), proj, proj_bias)


def expected_and_bound(x: Tensor, arguments: list[Tensor | None]) -> tuple[Tensor, float]:
    """In fp64, and twice torch's error in this dtype with one rounding of the largest value."""
    expected = by_torch(x.double(), [None if a is None else a.double() for a in arguments])
    floor = torch.finfo(x.dtype).eps * expected.abs().max().item()
    return expected, 2 * error(by_torch(x, arguments), expected) + floor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 32, 64, 65])
def test_mlp(device: str, backend: str, dtype: torch.dtype, biases: bool, rows: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    arguments = weights(16, dtype, device, biases)
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows)).to(device, dtype)[:, :16]
    before = x.clone()
    expected, bound = expected_and_bound(x, arguments)
    with prefer(backend):  # type: ignore[arg-type]
        scratch = linear_scratch(rows, 64, device)
        got = layernorm_gelu_mlp(x, *arguments)  # type: ignore[arg-type]
        again = layernorm_gelu_mlp(x, *arguments, scratch=scratch)  # type: ignore[arg-type]
    assert got.shape == x.shape and got.dtype == dtype
    assert error(got, expected) <= bound
    assert torch.equal(got, again) and torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_tolerance_bites(rows: int, dtype: torch.dtype) -> None:
    arguments = weights(24, dtype, "cpu", biases=True)
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected, bound = expected_and_bound(x, arguments)
    assert error(by_torch(x, arguments), expected) <= bound
    assert error(by_torch(x, arguments) - x, expected) > bound
    for missing in (1, 3, 5):
        fewer = [None if index == missing else a for index, a in enumerate(arguments)]
        assert error(by_torch(x, fewer), expected) > bound
    fc, proj = arguments[2], arguments[4]
    assert fc is not None and proj is not None
    for index, cut in ((2, fc.index_fill(1, torch.arange(8), 0)), (4, proj.index_fill(1, torch.arange(16), 0))):
        assert error(by_torch(x, [*arguments[:index], cut, *arguments[index + 1 :]]), expected) > bound
    if dtype == torch.float32:  # less than a rounding of 16 bits
        assert error(by_torch(x, arguments, "tanh"), expected) > bound


def test_a_layer_on_torch_has_the_bits_of_plain_expressions() -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=64, input_vocab_size=8, output_vocab_size=8, bias=True)
    layer = Layer(config, norm_bias=True)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad(), prefer("torch"):
        x, seen = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
        y = x + F.linear(seen, layer.out.weight, layer.out.bias)
        normed = F.layer_norm(y, (64,), layer.ln_2.weight, layer.ln_2.bias)
        hidden = F.gelu(F.linear(normed, layer.fc.weight, layer.fc.bias))
        expected = y + F.linear(hidden, layer.proj.weight, layer.proj.bias)
        assert torch.equal(layer(x, lambda qkv: seen), expected)


def test_what_does_not_fit_is_named() -> None:
    arguments = weights(24, torch.float32, "cpu", biases=False)
    with pytest.raises(InvalidInput, match=r"proj_weight is \(96, 24\)"):
        layernorm_gelu_mlp(torch.zeros(1, 24), *arguments[:4], arguments[2], None)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"proj_weight is \(24, 96\) torch.float16"):
        half = torch.zeros(24, 96).half()
        layernorm_gelu_mlp(torch.zeros(1, 24), *arguments[:4], half, None)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="proj_bias is"):
        layernorm_gelu_mlp(torch.zeros(1, 24), *arguments[:5], torch.zeros(96))  # type: ignore[arg-type]


def test_operator_holds_what_torch_asks_of_it() -> None:
    arguments = weights(24, torch.float32, "cpu", biases=True)
    x = torch.randn(3, 24)
    operator = torch.ops.bark_fast.layernorm_gelu_mlp.default
    torch.library.opcheck(operator, (x, *arguments), test_utils=("test_schema", "test_faketensor"))
    call = partial(layernorm_gelu_mlp, x, *arguments)  # type: ignore[arg-type]
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(), call())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [768, 1024])
def test_barks_widths(dtype: torch.dtype, width: int) -> None:
    arguments = weights(width, dtype, "cuda", biases=False)
    for rows in (1, 2, 4, 5, 16, 17, 32, 64, 257, 1024):
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to("cuda", dtype)
        expected, bound = expected_and_bound(x, arguments)
        with prefer("triton"):
            assert error(layernorm_gelu_mlp(x, *arguments), expected) <= bound  # type: ignore[arg-type]
