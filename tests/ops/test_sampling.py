"""The sampling kernel draws the tokens the torch reference draws, whatever the rows, rules and positions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bark_fast.ops import sampling as ops
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.ops.rule_rows import RuleRows, pack_rules, place_row, rule_row, unpack_rule
from bark_fast.ops.sampling import INVALID_TOKEN
from bark_fast.rule_layout import RuleFloat, RuleInt
from bark_fast.sampling import SamplingRule

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("bark_fast.kernels.sampling")
tl = triton.language

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTH = 13
EOS = WIDTH - 1
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 0.0},
    {"temperature": 0.0, "min_eos_p": 0.02},
    {"temperature": 0.0, "top_p": 0.3},
    *({"top_k": k} for k in (1, 2, 3, WIDTH - 1, WIDTH, WIDTH + 1)),
    *({"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1.0)),
    {"top_k": 5, "top_p": 0.7, "temperature": 0.8},
    {"top_k": 8, "top_p": 0.3, "temperature": 1.7},
    {"min_eos_p": 0.01},
    {"min_eos_p": 0.1, "top_k": 9, "top_p": 0.95, "temperature": 1.5},
]


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest) -> None:
    """Triton runs on CPU tensors only interpreted, where there is no GPU."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("Triton runs on CPU tensors only interpreted, where there is no GPU")


def logits_of(count: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Rows of many shapes: flat, peaked, quantised, one far ahead, all equal, masked columns, plain."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    x[0::7] *= 0.01
    x[1::7] *= 8
    x[2::7] = (x[2::7] * 2).round() / 2
    x[3::7, width // 2] += 20
    x[4::14] = -0.0
    x[5::14, ::3] = -torch.inf
    return x


def noise_of(*shape: int, seed: int = 1) -> Tensor:
    """Exp(1)."""
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed))


def rule_of(dialect: str, width: int = WIDTH, **values: Any) -> SamplingRule:
    """A rule over one window, its last column EOS."""
    given = {"temperature": 1.0, "eos_token": width - 1} | values
    return SamplingRule(dialect, ((0, width),), width, **given)  # type: ignore[arg-type]


def reference(logits: Tensor, noise: Tensor | None, rule: SamplingRule) -> Tensor:
    """The torch path, with sorts made stable: torch leaves open which of equal logits comes first."""
    with prefer("torch"), mock.patch.object(torch, "sort", partial(torch.sort, stable=True)):
        return ops.sample(logits, noise, rule, rule.eos_token)


def near_boundary(logits: Tensor, rule: SamplingRule) -> Tensor:
    """Rows where some token's cumulative mass is within fp32 rounding of top_p, computed in fp64."""
    if rule.top_p is None or rule.top_p >= 1 or rule.greedy:
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    x = logits.double()
    if rule.dialect == "suno":
        p = torch.softmax(x.sort(dim=-1, descending=True).values, -1)
        margin = (p.cumsum(-1) - p - rule.top_p).abs()[:, 1:]  # the first stays anyway
    else:
        x = (logits / rule.temperature).double()
        if rule.top_k is not None:
            kth = x.topk(min(rule.top_k, x.shape[-1])).values[:, -1:]
            x = x.masked_fill(x < kth, -torch.inf)
        margin = (torch.softmax(x.sort(dim=-1).values, -1).cumsum(-1) - (1 - rule.top_p)).abs()[:, :-1]
    return margin.amin(-1) < 1e-6


def assert_same(got: Tensor, logits: Tensor, noise: Tensor, rule: SamplingRule) -> int:
    """Equal tokens, save that rows on the boundary of top_p may take either side of it; returns how many
    are."""
    expected = reference(logits, noise, rule)
    edge = near_boundary(logits, rule)
    assert torch.equal(got[~edge], expected[~edge]), rule
    if edge.any():
        assert rule.top_p is not None
        either = torch.stack(
            [
                reference(logits, noise, replace(rule, top_p=min(1.0, max(1e-12, rule.top_p + by))))
                for by in (-3e-6, 0.0, 3e-6)
            ]
        )
        assert (either == got).any(0)[edge].all(), rule
    return int(edge.sum())


def draw(
    logits: Tensor, noise: Tensor | None, rows: RuleRows, places: Tensor | None = None, **options: Any
) -> Tensor:
    """Tokens by the kernel."""
    tokens, _ = kernels.sample(logits, noise, rows.integers, rows.numbers, places, rows.window, **options)
    return tokens  # type: ignore[no-any-return]


@pytest.mark.parametrize("chunk", [4, 16])
def test_a_hundred_thousand_rows_equal_the_reference(chunk: int) -> None:
    """Rules of both dialects mixed in every program; chunk 4 takes the paths of rows wider than a chunk."""
    count, edge = 1250, 0
    rules = [rule_of(dialect, **values) for values in SETTINGS for dialect in ("suno", "hf")]
    total = count * len(rules)
    x, q = logits_of(total, seed=chunk), noise_of(total, WIDTH, seed=chunk)
    rows = pack_rules(rules * count)
    got = draw(x, q, rows, rows_a_program=8192, chunk=chunk)
    for index, rule in enumerate(rules):
        one = slice(index, None, len(rules))
        edge += assert_same(got[one], x[one], q[one], rule)
    assert total >= 50_000
    assert edge < 0.005 * total


@pytest.mark.parametrize("dialect", ["suno", "hf"])
@pytest.mark.parametrize(
    "values",
    [{"top_k": 1}, {"top_k": 7}, {"top_p": 0.2}, {"top_k": 6, "top_p": 0.8, "temperature": 1.3}],
    ids=str,
)
def test_rows_narrowed_to_a_chunk_equal_the_reference(dialect: str, values: dict[str, Any]) -> None:
    """Rows wider than a chunk whose candidates fit: they are gathered in scratch, and drawn from there."""
    width = 61
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(2)) * 4
    x[::3] = (x[::3] * 4).round() / 4  # ties, but not many
    x[1::3, ::4] = -torch.inf
    q, rule = noise_of(64, width), rule_of(dialect, width, **values)
    scratch = torch.full((64, 16), -7, dtype=torch.int32)
    got = draw(x, q, pack_rules([rule]).expand(64), rows_a_program=16, chunk=16, scratch=scratch)
    assert (scratch[:, 0] != -7).float().mean() >= 0.5
    assert_same(got, x, q, rule)


@pytest.mark.parametrize(("dialect", "first"), [("suno", 7), ("hf", 3)])
def test_log_probabilities_that_round_to_the_same_tie(dialect: str, first: int) -> None:
    """Hugging Face's greedy search looks at them, suno's at the logits."""
    x = torch.zeros(1, WIDTH)
    x[0, 7] = 0.25
    x[0, 3] = torch.nextafter(x[0, 7], torch.tensor(0.0))
    rule = rule_of(dialect, temperature=0.0)
    assert reference(x, None, rule).item() == first
    assert draw(x, None, pack_rules([rule])).item() == first


def test_a_row_that_keeps_everything_beside_narrow_ones() -> None:
    """It does not fit into a chunk, so no row of its program may be gathered."""
    width = 61
    x, q = torch.randn(16, width, generator=torch.Generator().manual_seed(2)) * 4, noise_of(16, width)
    rules = [rule_of("hf", width, **({"top_k": 3} if row % 4 else {})) for row in range(16)]
    got = draw(x, q, pack_rules(rules), rows_a_program=4, chunk=16)
    for row, rule in enumerate(rules):
        assert_same(got[row, None], x[row, None], q[row, None], rule)


@pytest.mark.parametrize("tied", range(1, 6))
def test_ties_that_fill_a_chunk_or_spill_over(tied: int) -> None:
    """15 are ahead, and with the 16th all that equal it stay: the last of them is drawn."""
    x = torch.full((1, 61), -1.0)
    x[0, :15], x[0, 40 : 40 + tied] = torch.linspace(2, 1, 15), 0.5
    q = torch.ones(1, 61)
    q[0, 39 + tied] = 1e-3
    rule = rule_of("hf", 61, top_k=16)
    got = draw(x, q, pack_rules([rule]), chunk=16)
    assert got.item() == 39 + tied
    assert_same(got, x, q, rule)


@pytest.mark.parametrize("values", [{}, {"top_k": 7}, {"top_p": 0.99}], ids=str)
def test_philox_noise_of_rows_wider_than_a_chunk(values: dict[str, Any]) -> None:
    """Column by column the noise of the reference, with candidates gathered, and with whole rows."""
    width, rule = 61, rule_of("suno", 61, **values)
    x = torch.randn(32, width, generator=torch.Generator().manual_seed(5))
    places = torch.tensor([place_row(SEED, step, 1, 2) for step in range(32)])
    q = PhiloxNoise(SEED, x.device).codes(2, 1, 0, 32, width)
    got = draw(x, None, pack_rules([rule]).expand(32), places, rows_a_program=8, chunk=16)
    assert_same(got, x, q, rule)
    assert len(set((got // 16).tolist())) > 2


@triton.jit
def _divide_kernel(x, divisor, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    by = tl.load(divisor + at)
    tl.store(out + at, kernels._divide(tl.load(x + at), by, tl.div_rn(1.0, by)))


@pytest.mark.parametrize("device", DEVICES)
def test_quotients_are_those_of_ieee_division(device: str) -> None:
    """To the bit, as torch's are: otherwise logits that tie in one of them do not in the other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator) * 10 ** torch.randint(-6, 7, (4096,), generator=generator)
    x[:4] = torch.tensor([0.0, -torch.inf, 3.4e38, 1e-30])
    divisor = torch.rand(4096, generator=generator) * 3 + 1e-3
    x, divisor = x.to(device), divisor.to(device)
    out = torch.empty_like(x)
    _divide_kernel[(1,)](x, divisor, out, COUNT=4096)
    assert (x * (1 / divisor) != x / divisor).float().mean() > 0.1
    assert torch.equal(out, x / divisor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dialect", ["suno", "hf"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 50, "top_p": 0.9, "temperature": 0.7, "min_eos_p": 0.2},
        {"top_k": 50},
        {"top_k": 5000, "top_p": 0.95},
        {"top_p": 0.3},
    ],
    ids=str,
)
def test_the_semantic_window(device: str, dialect: str, values: dict[str, Any]) -> None:
    """10,001 columns of a head of 10,048, at production's launch; duplicates and a masked stretch among
    them."""
    count = 3 if device == "cpu" else 256
    x = logits_of(count, 10_001, seed=3) * 2
    x[:, 5000:6000] = x[:, :1000]
    head = torch.full((count, 10_048), 50.0)
    head[:, :10_001] = x
    q, rule = noise_of(count, 10_001).to(device), rule_of(dialect, 10_001, **values)
    rows = pack_rules([rule], device).expand(count)
    got = draw(head.to(device), q, rows)
    assert_same(got, x.to(device), q, rule)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_hundred_thousand_rows_on_a_gpu(dtype: torch.dtype) -> None:
    """Production's shapes, one row a program; k around the 1,024 columns that a program narrows a row to."""
    settings: list[dict[str, Any]] = [
        {"top_k": 50, "top_p": 0.9}, {"top_p": 0.5, "temperature": 0.7}, {"temperature": 0.7}, {"top_p": 0.999},
        *({"top_k": k} for k in (1, 1023, 1024, 1025)),
    ]  # fmt: skip
    for width, count in ((1024, 4000), (10_001, 2500)):
        x, q = logits_of(count, width).to("cuda", dtype), noise_of(count, width).cuda()
        for values in settings:
            for dialect in ("suno", "hf"):
                rule = rule_of(dialect, width, **values)
                got = draw(x, q, pack_rules([rule], "cuda").expand(count))
                differing = (got != reference(x, q, rule)) & ~near_boundary(x.float(), rule)
                # exp and log differ in the last bits: two candidates closer than that may swap
                assert differing.float().mean() < 2e-3


class TestWhatTheComparisonCatches:
    """A kernel wrong by little draws other tokens in the very rows compared."""

    @pytest.mark.parametrize("dialect", ["suno", "hf"])
    @pytest.mark.parametrize(
        ("values", "wrong"),
        [
            ({"top_k": 3}, {"top_k": 4}),
            ({"top_k": 3}, {"top_k": 2}),
            ({"temperature": 0.3}, {"temperature": 1.0}),
            ({"top_p": 0.5}, {"top_p": 0.52}),
            ({"min_eos_p": 0.03}, {"min_eos_p": 0.04}),
        ],
        ids=str,
    )
    def test_a_parameter_off_by_little(
        self, dialect: str, values: dict[str, Any], wrong: dict[str, Any]
    ) -> None:
        x, q = logits_of(2000), noise_of(2000, WIDTH)
        rows = pack_rules([rule_of(dialect, **wrong)]).expand(2000)
        got = draw(x, q, rows, rows_a_program=2048)
        with pytest.raises(AssertionError):
            assert_same(got, x, q, rule_of(dialect, **values))

    def test_the_other_dialect(self) -> None:
        x, q = logits_of(2000), noise_of(2000, WIDTH)
        values = {"top_k": 5, "top_p": 0.7, "temperature": 0.5}
        got = draw(x, q, pack_rules([rule_of("hf", **values)]).expand(2000), rows_a_program=2048)
        with pytest.raises(AssertionError):
            assert_same(got, x, q, rule_of("suno", **values))


def drawable(logits: Tensor, rule: SamplingRule, backend: str) -> list[int]:
    """Columns that noise can make win."""
    width = logits.shape[-1]
    noise = torch.full((width, width), 1e3)
    noise.fill_diagonal_(1e-3)
    with prefer(backend):  # type: ignore[arg-type]
        tokens = ops.sample(logits.expand(width, width).contiguous(), noise, rule, rule.eos_token)
    return sorted(set(tokens.tolist()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
class TestBoundaries:
    """What equality means, on rows whose masses are exact in fp32."""

    def test_suno_keeps_the_token_before_which_the_mass_is_exactly_top_p(self, backend: str) -> None:
        rule = SamplingRule("suno", ((0, 4),), 4, temperature=1.0, top_p=0.25)
        assert drawable(torch.zeros(4), rule, backend) == [0, 1]
        assert drawable(torch.zeros(4), replace(rule, top_p=0.2499), backend) == [0]

    def test_hf_drops_the_token_up_to_which_the_mass_is_exactly_the_rest(self, backend: str) -> None:
        rule = SamplingRule("hf", ((0, 4),), 4, temperature=1.0, top_p=0.75)
        assert drawable(torch.zeros(4), rule, backend) == [1, 2, 3]
        assert drawable(torch.zeros(4), replace(rule, top_p=0.7501), backend) == [0, 1, 2, 3]

    @pytest.mark.parametrize("dialect", ["suno", "hf"])
    def test_top_k_keeps_ties_with_the_last(self, backend: str, dialect: str) -> None:
        rule = SamplingRule(dialect, ((0, 5),), 5, temperature=1.0, top_k=2)  # type: ignore[arg-type]
        assert drawable(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), rule, backend) == [1, 2, 3]
        assert drawable(torch.tensor([1.0, 3.0, 2.0, 1.5, 0.0]), rule, backend) == [1, 2]

    @pytest.mark.parametrize("dialect", ["suno", "hf"])
    def test_the_likeliest_always_stays(self, backend: str, dialect: str) -> None:
        rule = SamplingRule(dialect, ((0, 3),), 3, temperature=1.0, top_p=1e-12)  # type: ignore[arg-type]
        assert drawable(torch.tensor([0.0, 1.0, 0.5]), rule, backend) == [1]

    def test_eos_thresholds_are_inclusive_for_suno_and_strict_for_hf(self, backend: str) -> None:
        logits, noise = torch.zeros(1, 4), torch.tensor([[0.1, 1.0, 1.0, 1.0]])
        for dialect, expected in (("suno", 3), ("hf", 0)):
            rule = rule_of(dialect, 4, min_eos_p=0.25)
            with prefer(backend):  # type: ignore[arg-type]
                assert ops.sample(logits, noise, rule, 3).item() == expected

    @pytest.mark.parametrize("dialect", ["suno", "hf"])
    def test_eos_is_the_column_the_caller_names(self, backend: str, dialect: str) -> None:
        """Not the row of the head, which the rule has; without such a column nothing is forced."""
        logits, noise = torch.zeros(1, 4), torch.tensor([[0.1, 1.0, 1.0, 1.0]])
        rule = SamplingRule(dialect, ((20, 24),), 24, temperature=1.0, min_eos_p=0.2, eos_token=23)  # type: ignore[arg-type]
        for column, expected in ((3, 3), (2, 2), (None, 0)):
            with prefer(backend):  # type: ignore[arg-type]
                assert ops.sample(logits, noise, rule, column).item() == expected

    def test_argmax_takes_the_first_of_equals(self, backend: str) -> None:
        logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [-0.0, 0.0, -3.0, 0.0]])
        for dialect in ("suno", "hf"):
            with prefer(backend):  # type: ignore[arg-type]
                got = ops.sample(logits, None, rule_of(dialect, 4, temperature=0.0), None)
            assert got.tolist() == [1, 0]

    @pytest.mark.parametrize("dialect", ["suno", "hf"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_an_invalid_row_is_flagged_and_its_neighbours_are_right(
        self, backend: str, dialect: str, bad: float
    ) -> None:
        x, q = logits_of(5), noise_of(5, WIDTH)
        rows = pack_rules([rule_of(dialect, top_k=5, top_p=0.9)]).expand(5)
        clean_flag, flag = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with prefer(backend):  # type: ignore[arg-type]
            clean = ops.sample_rows(x, rows, noise=q, flag=clean_flag)
            x[1, 5] = bad
            x[3] = -torch.inf
            got = ops.sample_rows(x, rows, noise=q, flag=flag)
        assert clean_flag.item() == 0 and flag.item() == 1
        assert got[[1, 3]].tolist() == [INVALID_TOKEN] * 2
        assert torch.equal(got[[0, 2, 4]], clean[[0, 2, 4]]) and (clean >= 0).all()

    def test_a_flag_once_set_stays_set(self, backend: str) -> None:
        """A burst looks at it once, after steps of which only some went wrong."""
        rows, flag = pack_rules([GREEDY]).expand(2), torch.zeros(1, dtype=torch.int32)
        x = torch.zeros(2, 50)
        x[1, 4] = torch.nan
        with prefer(backend):  # type: ignore[arg-type]
            for logits in (x, torch.zeros(2, 50)):
                ops.sample_rows(logits, rows, flag=flag)
                assert flag.item() == 1

    def test_codes(self, backend: str) -> None:
        x, q = logits_of(9, 16), noise_of(9, 16)
        with prefer(backend):  # type: ignore[arg-type]
            assert torch.equal(ops.sample_codes(x, q, 0.5), (torch.softmax(x / 0.5, -1) / q).argmax(-1))
            assert torch.equal(ops.sample_codes(x, None, 0.0), x.argmax(-1))


COARSE = SamplingRule("suno", ((20, 31), (31, 44)), 50, temperature=0.7, top_k=6)
SEMANTIC = SamplingRule("hf", ((0, 25),), 50, temperature=0.9, top_p=0.8, min_eos_p=0.05, eos_token=24)
GREEDY = SamplingRule("suno", ((2, 9),), 50, temperature=0.0)
SEED = 2**63 + 5


def mixed_batch() -> tuple[Tensor, RuleRows, Tensor]:
    """Full-head logits of sequences that differ in everything."""
    rules = [COARSE, SEMANTIC, COARSE, GREEDY, SEMANTIC, COARSE]
    steps = [0, 7, 3, 2, 100_000, 9]
    places = [place_row(SEED + row, step, row % 2, row) for row, step in enumerate(steps)]
    return (
        torch.randn(6, 50, generator=torch.Generator().manual_seed(0)),
        pack_rules(rules),
        torch.tensor(places),
    )


def test_rows_of_different_rules_steps_and_seeds_share_a_launch() -> None:
    logits, rows, places = mixed_batch()
    with prefer("torch"):
        expected = ops.sample_rows(logits, rows, places)
    for row, (rule, place) in enumerate(zip([COARSE, SEMANTIC, COARSE], places.tolist(), strict=False)):
        low, high = rule.window(place[1])
        noise = PhiloxNoise(SEED + row, logits.device).token(rule, place[3], place[2], place[1])
        scores, eos = logits[row, None, low:high], rule.eos_token
        with prefer("torch"):
            assert expected[row] == low + ops.sample(scores, noise[None], rule, eos)
    outside, broken = expected.clone(), logits.clone()
    outside[[1, 4]], broken[2, 35] = INVALID_TOKEN, torch.nan
    for backend in ("torch", "triton"):
        with prefer(backend):  # type: ignore[arg-type]
            assert torch.equal(ops.sample_rows(logits, rows, places), expected)
            # logits that start at row 2 of the head, strided: the semantic window is not within
            for high in (44, 50):
                part = ops.sample_rows(logits[:, 2:high], rows, places, logits_low=2)
                assert torch.equal(part, outside)
            # and logits that end at row 40: the second coarse window does not
            for low in (0, 2):
                short = ops.sample_rows(logits[:, low:40], rows, places, logits_low=low)
                beyond = [False, low > 0, True, False, low > 0, True]
                assert (short == INVALID_TOKEN).tolist() == beyond
            # an invalid row says so wherever its window begins
            invalid = ops.sample_rows(broken, rows, places)
            assert (invalid == INVALID_TOKEN).tolist() == [False, False, True, False, False, False]


def test_a_row_draws_the_same_token_at_any_place_of_any_batch() -> None:
    logits, rows, places = mixed_batch()
    whole = draw(logits, None, rows, places)
    for rows_a_program in (2, 4, 8):
        assert torch.equal(draw(logits, None, rows, places, rows_a_program=rows_a_program), whole)
    for order in ([3], [5, 0], [4, 3, 2, 1, 0], [1, 1, 1]):
        part = RuleRows(rows.integers[order], rows.numbers[order], rows.window, rows.filters)
        assert torch.equal(draw(logits[order], None, part, places[order]), whole[order])
    moved = places.clone()
    moved[:, 3] += 1
    assert not torch.equal(draw(logits, None, rows, moved), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_logits_are_sampled_in_fp32(dtype: torch.dtype) -> None:
    x, q = logits_of(64).to(dtype), noise_of(64, WIDTH)
    rows = pack_rules([rule_of("hf", top_k=6, top_p=0.8, temperature=0.7)]).expand(64)
    assert torch.equal(draw(x, q, rows, rows_a_program=64), draw(x.float(), q, rows, rows_a_program=64))


def test_nonsense_in_rules_and_places_touches_nothing_and_says_so() -> None:
    """Windows outside the logits, too wide or inside out; wild integers, NaN parameters."""
    generator = torch.Generator().manual_seed(0)
    wild = torch.randint(-(2**31), 2**31 - 1, (64, len(RuleInt)), generator=generator).to(torch.int32)
    numbers = torch.randn(64, len(RuleFloat), generator=generator) * 1e30
    numbers[::3] = torch.nan
    places = torch.randint(-(2**62), 2**62, (64, 4), generator=generator)
    flag = torch.zeros(1, dtype=torch.int32)
    good, row = rule_row(COARSE)
    wild[0], numbers[0], places[0, 1] = torch.tensor(good), torch.tensor(row), 4
    tokens = draw(torch.randn(64, 50), None, RuleRows(wild, numbers, 13, True), places, flag=flag)
    assert 20 <= tokens[0] < 31
    assert (tokens[1:] == INVALID_TOKEN).all() and flag.item() == 1
    inside = torch.tensor(good, dtype=torch.int32).repeat(64, 1)
    inside[:, RuleInt.TOP_K], inside[:, RuleInt.EOS] = wild[:, RuleInt.TOP_K], wild[:, RuleInt.EOS]
    tokens = draw(torch.randn(64, 50), None, RuleRows(inside, numbers, 13, True), places)
    assert ((tokens == INVALID_TOKEN) | ((tokens >= 20) & (tokens < 44))).all()


@pytest.mark.parametrize("dialect", ["suno", "hf"])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_a_rule_comes_back_from_its_row(dialect: str, values: dict[str, Any]) -> None:
    rule = rule_of(dialect, **values)
    packed = pack_rules([rule])
    back = unpack_rule(packed.integers[0].tolist(), packed.numbers[0].tolist())
    assert (back.dialect, back.windows, back.greedy, back.top_k, back.eos_token) == (
        rule.dialect, rule.windows, rule.greedy, rule.top_k, rule.eos_token,
    )  # fmt: skip
    for name in ("temperature", "top_p", "min_eos_p"):
        expected = getattr(rule, name)
        if name == "top_p" and expected == 1.0:
            expected = None
        # Hugging Face's 1 - top_p is what fp32 holds
        assert getattr(back, name) == (
            None if expected is None else pytest.approx(expected, rel=1e-6, abs=1e-7)
        )


def test_a_top_k_beyond_any_head_keeps_everything() -> None:
    """It may be too large for the int32 column that holds it."""
    x, q = logits_of(20), noise_of(20, WIDTH)
    everything, huge = (rule_of("suno", top_k=k) for k in (WIDTH, 2**31))
    for backend in ("torch", "triton"):
        with prefer(backend):  # type: ignore[arg-type]
            drawn = ops.sample_rows(x, pack_rules([huge]).expand(20), noise=q)
            assert torch.equal(drawn, ops.sample(x, q, everything, WIDTH - 1))


def test_no_rows() -> None:
    rows = pack_rules([GREEDY]).expand(0)
    for backend in ("torch", "triton"):
        with prefer(backend):  # type: ignore[arg-type]
            assert ops.sample_rows(torch.zeros(0, 50), rows).shape == (0,)
            assert ops.exponential(torch.zeros(0, 4, dtype=torch.int64), 5).shape == (0, 5)


def test_operators_pass_opcheck_and_trace() -> None:
    logits, rows, places = mixed_batch()
    tokens, flag = torch.zeros(6, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    arguments = (logits, rows.integers, rows.numbers, places, None, tokens, flag, rows.window, True, 0)
    torch.library.opcheck(torch.ops.bark_fast.sample_rows, arguments)
    torch.library.opcheck(torch.ops.bark_fast.exponential, (places, 7))
    traced = torch.compile(lambda: ops.sample_rows(logits, rows, places), backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(), ops.sample_rows(logits, rows, places))
    fill = torch.compile(lambda: ops.exponential(places, 7), backend="aot_eager", fullgraph=True)
    assert torch.equal(fill(), ops.exponential(places, 7))
