"""head_sample against LayerNorm, head and draw one after another in fp64."""

from __future__ import annotations

from dataclasses import replace
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


def probabilities(arguments: Any, temperature: float) -> Tensor:
    """Of the window's columns, fp64, from inputs that `expected_tokens` takes."""
    x, weight, bias, head = arguments
    h = F.layer_norm(x.double(), weight.shape, weight.double(), None if bias is None else bias.double(), 1e-5)
    return torch.softmax(h @ head[LOW:HIGH].double().T / temperature, -1)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dialect", ["suno", "hf"])
def test_eos_is_forced_from_its_probability_on(rows: int, dialect: Any) -> None:
    """suno's after the temperature, Hugging Face's before; thresholds just below it and just above."""
    arguments = inputs(rows, 72, True)
    p = probabilities(arguments, 0.6 if dialect == "suno" else 1.0)
    noise = torch.ones(rows, HIGH - LOW)
    for factor in (0.99, 1.01):
        eos = [LOW + 7 + row for row in range(rows)]
        rules = [
            SamplingRule(
                dialect, ((LOW, HIGH),), VOCABULARY, temperature=0.6, eos_token=eos[row],
                min_eos_p=factor * p[row, eos[row] - LOW].item(),
            )
            for row in range(rows)
        ]  # fmt: skip
        got = kernels.head_sample(*arguments, noise, *packed_columns(rules), None, HIGH - LOW)[0]
        plain = expected_tokens(*arguments, noise, replace(rules[0], eos_token=None, min_eos_p=None))
        assert got.tolist() == (eos if factor < 1 else plain.tolist())
        assert set(eos).isdisjoint(plain.tolist())


def packed_columns(rules: list[SamplingRule]) -> tuple[Tensor, Tensor]:
    """Both tensors of packed rules."""
    rows = pack_rules(rules)
    return rows.integers, rows.numbers


@pytest.mark.parametrize("rows", [1, 3])
def test_an_eos_threshold_met_exactly(rows: int) -> None:
    """64 equal logits, of probability 1/64 each: suno's bound is inclusive, Hugging Face's is not."""
    x, weight, bias, head = inputs(rows, 40, False)
    head[:] = torch.eye(1, 40)  # one product each: no order of summing, which differs by column in some BLAS
    for dialect, expected in (("suno", 20), ("hf", 0)):
        rule = SamplingRule(dialect, ((0, 64),), VOCABULARY, 1.0, eos_token=20, min_eos_p=1 / 64)  # type: ignore[arg-type]
        noise = torch.ones(rows, 64)
        noise[:, 0] = 0.5
        got = kernels.head_sample(x, weight, bias, head, noise, *packed_columns([rule] * rows), None, 64)[0]
        assert got.tolist() == [expected] * rows


@pytest.mark.parametrize("rows", [1, 3])
def test_no_eos_where_none_can_be(rows: int) -> None:
    """suno's greedy search knows no threshold, and an EOS outside the window cannot be drawn."""
    arguments = inputs(rows, 72, False)
    noise = torch.empty(rows, HIGH - LOW).exponential_(generator=torch.Generator().manual_seed(1))
    for temperature, eos in ((0.0, LOW + 9), (1.0, HIGH + 3), (1.0, LOW - 1)):
        rule = SamplingRule("suno", ((LOW, HIGH),), VOCABULARY, temperature, eos_token=eos, min_eos_p=0.0)
        got = kernels.head_sample(*arguments, noise, *packed_columns([rule] * rows), None, HIGH - LOW)[0]
        assert torch.equal(got, expected_tokens(*arguments, noise, replace(rule, eos_token=None)))


@pytest.mark.parametrize("rows", [1, 16])
def test_rows_with_hardly_any_spread(rows: int) -> None:
    """Their variance is below the epsilon of the norm."""
    x, weight, bias, head = inputs(rows, 72, True)
    rule = SamplingRule("suno", ((LOW, HIGH),), VOCABULARY, temperature=0.3)
    same, compared = 0, 0
    for seed in range(8):
        noise = torch.empty(rows, HIGH - LOW).exponential_(generator=torch.Generator().manual_seed(seed))
        arguments = (0.0005 * x, weight, bias, head)
        expected = expected_tokens(*arguments, noise, rule)
        got = kernels.head_sample(*arguments, noise, *packed_columns([rule] * rows), None, HIGH - LOW)[0]
        assert torch.equal(got, expected)
        same += int((expected == expected_tokens(x, weight, bias, head, noise, rule)).sum())
        compared += rows
    assert same < compared  # what a norm without epsilon would draw


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dialect", ["suno", "hf"])
def test_logits_that_are_all_negative(rows: int, dialect: Any) -> None:
    x, weight, bias, head = inputs(rows, 72, True)
    bias[0], head[:, 0] = 20.0, -1.0
    for temperature in (0.0, 0.7):
        rule = SamplingRule(dialect, ((LOW, HIGH),), VOCABULARY, temperature=temperature)
        noise = torch.empty(rows, HIGH - LOW).exponential_(generator=torch.Generator().manual_seed(1))
        got = kernels.head_sample(
            x, weight, bias, head, noise, *packed_columns([rule] * rows), None, HIGH - LOW
        )
        assert torch.equal(got[0], expected_tokens(x, weight, bias, head, noise, rule))


@pytest.mark.parametrize("rows", [1, 2])
def test_more_tiles_than_are_joined_at_once(rows: int) -> None:
    """The first of equal logits wins though a later one is joined before it, and the last tile can win."""
    window, width = 4200, 16
    assert kernels.tiles(window, rows)[1] > kernels.JOIN[1 if rows == 1 else 16]
    x, weight, _, _ = inputs(rows, width, False)
    head = torch.randn(window, width, generator=torch.Generator().manual_seed(0)) * 0.1
    greedy = SamplingRule("suno", ((0, window),), window, temperature=0.0)
    last = kernels.JOIN[1 if rows == 1 else 16] * kernels.tiles(window, rows)[0]  # joined with the first ones
    for places, expected in (([5, last + 3], 5), ([last - 1], last - 1), ([window - 1], window - 1)):
        tried = head.clone()
        tried[places] = F.layer_norm(x[0], (width,)) * weight
        got = kernels.head_sample(x, weight, None, tried, None, *packed_columns([greedy] * rows), None, window)
        assert got[0][0] == expected


def test_a_row_of_another_window_is_invalid() -> None:
    arguments = inputs(3, 40, False)
    rules = [
        SamplingRule("suno", (window,), VOCABULARY, temperature=0.0)
        for window in ((LOW, HIGH), (LOW + 1, HIGH), (LOW, HIGH - 1))
    ]
    tokens, flag = kernels.head_sample(*arguments, None, *packed_columns(rules), None, HIGH - LOW)
    assert tokens[0] >= LOW and tokens[1:].tolist() == [INVALID_TOKEN] * 2 and flag.item() == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_a_logit_that_is_nan_spoils_its_row_and_no_noise_is_only_for_greedy(rows: int) -> None:
    x, weight, bias, head = inputs(rows, 40, False)
    sampled = SamplingRule("hf", ((LOW, HIGH),), VOCABULARY, temperature=1.0)
    got = kernels.head_sample(x, weight, bias, head, None, *packed_columns([sampled] * rows), None, HIGH - LOW)
    assert (got[0] == INVALID_TOKEN).all() and got[1].item() == 1
    head[LOW + 50, 3] = torch.nan
    greedy = replace(sampled, temperature=0.0)
    got = kernels.head_sample(x, weight, bias, head, None, *packed_columns([greedy] * rows), None, HIGH - LOW)
    assert (got[0] == INVALID_TOKEN).all() and got[1].item() == 1


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
