"""head_sample against LayerNorm, head and draw one after another in fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bark_fast.errors import InvalidInput
from bark_fast.ops import sampling as ops
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.rule_rows import pack_rules, place_row
from bark_fast.ops.sampling import INVALID_TOKEN
from bark_fast.sampling import SamplingRule

pytest.importorskip("triton")
kernels = pytest.importorskip("bark_fast.kernels.head_sampling")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOW, HIGH, VOCABULARY = 30, 151, 200


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest) -> None:
    """Triton runs on CPU tensors only interpreted, where there is no GPU."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("Triton runs on CPU tensors only interpreted, where there is no GPU")


def inputs(rows: int, width: int, bias: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """x, norm weight and bias, head: slices of wider tensors, so that rows are strided."""
    generator = torch.Generator().manual_seed(rows * width)
    random = partial(torch.randn, generator=generator)
    head = (random(VOCABULARY, width + 8) * 0.3).to(device, dtype)[:, :width]
    x = random(rows, width + 3).to(device, dtype)[:, :width]
    weight, shift = (random(width) * 0.2 + 1).to(device, dtype), random(width).to(device, dtype)
    return x, weight, shift if bias else None, head


def expected_tokens(
    x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor, noise: Tensor | None, rule: SamplingRule
) -> Tensor:
    """Tokens of fp64 logits, rounded to fp32 only for the draw."""
    h = F.layer_norm(x.double(), weight.shape, weight.double(), None if bias is None else bias.double(), 1e-5)
    logits = h.to(x.dtype).double() @ head[LOW:HIGH].double().T
    eos = None if rule.eos_token is None else rule.eos_token - LOW
    with prefer("torch"):
        return ops.sample(logits.float(), noise, rule, eos) + LOW


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dialect", ["suno", "hf"])
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(
    "values",
    [{}, {"temperature": 0.5}, {"temperature": 0.0}, {"min_eos_p": 0.02, "temperature": 0.7}],
    ids=str,
)
def test_tokens_equal_the_three_steps(device: str, dialect: Any, rows: int, values: dict[str, Any]) -> None:
    arguments = inputs(rows, 72, bias=rows != 5, device=device)
    rule = SamplingRule(
        dialect, ((LOW, HIGH),), VOCABULARY, **({"temperature": 1.0, "eos_token": HIGH - 1} | values)
    )
    noise = torch.empty(rows, HIGH - LOW).exponential_(generator=torch.Generator().manual_seed(1)).to(device)
    scratch = kernels.head_scratch(HIGH - LOW, rows, torch.device(device))
    packed = pack_rules([rule], device).expand(rows)
    for _ in range(2):  # the second finds the counter as the first left it
        got, flag = kernels.head_sample(
            *arguments, noise, packed.integers, packed.numbers, None, HIGH - LOW, scratch=scratch
        )
        assert torch.equal(got, expected_tokens(*arguments, noise, rule))
        assert flag.item() == 0 and scratch[1].item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("width", [768, 1024])
def test_tokens_on_a_gpu(dtype: torch.dtype, rows: int, width: int) -> None:
    arguments = inputs(rows, width, False, "cuda", dtype)
    rule = SamplingRule("suno", ((LOW, HIGH),), VOCABULARY, temperature=0.7)
    packed = pack_rules([rule], "cuda").expand(rows)
    same = 0
    for seed in range(200):
        noise = torch.empty(rows, HIGH - LOW).exponential_(generator=torch.Generator().manual_seed(seed)).cuda()
        got = ops.head_sample(*arguments, packed, noise=noise)
        same += int((got == expected_tokens(*arguments, noise, rule)).sum())
    # the normalised rows may round to the neighbour in half precision
    assert same >= (0.999 if dtype == torch.float32 else 0.97) * 200 * rows


def test_what_the_comparison_catches() -> None:
    arguments = inputs(16, 72, True)
    rule = SamplingRule("suno", ((LOW, HIGH),), VOCABULARY, temperature=0.5)
    noise = torch.empty(16, HIGH - LOW).exponential_(generator=torch.Generator().manual_seed(1))
    packed = pack_rules([rule]).expand(16)
    x, weight, bias, head = arguments
    expected = expected_tokens(*arguments, noise, rule)
    with prefer("triton"):
        assert torch.equal(ops.head_sample(*arguments, packed, noise=noise), expected)
        assert not torch.equal(ops.head_sample(x, weight, None, head, packed, noise=noise), expected)
        assert not torch.equal(ops.head_sample(x, weight, bias, head.roll(1, 0), packed, noise=noise), expected)
        assert not torch.equal(ops.head_sample(*arguments, packed, noise=noise.roll(1, 1)), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_philox_draws_and_windows_are_those_of_sample_rows(rows: int) -> None:
    """Alternating windows by the step on the device, the same tokens as the torch path."""
    arguments = inputs(rows, 40, False)
    rule = SamplingRule("suno", ((10, 47), (47, 84)), VOCABULARY, temperature=0.9)
    packed = pack_rules([rule] * rows)
    for step in (4, 5):
        places = torch.tensor([place_row(11 + row, step, 1, 0) for row in range(rows)])
        tokens = []
        for backend in ("torch", "triton"):
            with prefer(backend):  # type: ignore[arg-type]
                tokens.append(ops.head_sample(*arguments, packed, places))
        assert torch.equal(*tokens)
        low, high = rule.window(step)
        assert ((tokens[0] >= low) & (tokens[0] < high)).all()


@pytest.mark.parametrize("rows", [1, 4])
def test_an_invalid_row_is_flagged_alone(rows: int) -> None:
    x, weight, bias, head = inputs(rows, 40, False)
    packed = pack_rules([SamplingRule("hf", ((LOW, HIGH),), VOCABULARY, temperature=0.0)]).expand(rows)
    flag = torch.zeros(1, dtype=torch.int32)
    with prefer("triton"):
        clean = ops.head_sample(x, weight, bias, head, packed, flag=flag)
        assert flag.item() == 0
        x[0, 3] = torch.nan
        got = ops.head_sample(x, weight, bias, head, packed, flag=flag)
    assert got[0] == INVALID_TOKEN and flag.item() == 1
    assert torch.equal(got[1:], clean[1:])


def test_filters_are_refused() -> None:
    packed = pack_rules([SamplingRule("hf", ((LOW, HIGH),), VOCABULARY, temperature=1.0, top_k=3)])
    with pytest.raises(InvalidInput, match="sample_rows"):
        ops.head_sample(*inputs(1, 40, False), packed)


def test_the_operator_passes_opcheck_and_traces() -> None:
    arguments = inputs(2, 40, True)
    packed = pack_rules([SamplingRule("hf", ((LOW, HIGH),), VOCABULARY, temperature=0.0)] * 2)
    tokens, flag = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.bark_fast.head_sample,
        (*arguments, packed.integers, packed.numbers, None, None, tokens, flag, HIGH - LOW),
    )
    traced = torch.compile(lambda: ops.head_sample(*arguments, packed), backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(), ops.head_sample(*arguments, packed))
